// A block's pieces, one after the other.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/merge.cuh"
#include "cuda/decode_attn/schedule.cuh"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda::decode {

// Query heads [first_head, first_head + heads) of batch row b, of key/value head `head`.
struct Item {
  int b, in_row, head, first_head, heads;

  __device__ __forceinline__ Item(const DecodeAttnParams& params, int row, int item)
      : b(row), in_row(item), head(item / params.head_chunks) {
    const int group = static_cast<int>(params.query_heads) / static_cast<int>(params.kv_heads);
    const int before = (item - head * params.head_chunks) * kDecodeHeads;
    first_head = head * group + before;
    heads = min(group - before, kDecodeHeads);
  }
};

// Tiles [first, end) of an item. Counts: of its row.
template <typename Counts>
struct Piece {
  int b, head, first_head, heads, first, end;
  Counts counts;
};

// Waits for the kernel before this one, then works. attend(state, piece): the calling warp's part of a piece; it may
// use `warp_bytes` of `shared`, the warp's own, and leaves no copy to it under way. MinTiles: as in Shares.
template <int D, int Warps, int MinTiles, typename Rows, typename Attend>
__device__ __forceinline__ void walk(const DecodeAttnParams& params, const Rows& rows, unsigned char* shared,
                                     int warp_bytes, const Attend& attend) {
  // What attend() has no registers for. First what is known before any count is, a block's item if items stay apart:
  // found while the kernel before this one ends, and through shared memory, or the compiler would find it afterwards.
  __shared__ volatile struct Kept {
    int b, head, first_head, heads, of_item, part, place;
    std::uint32_t at, last;
  } kept;
  static_assert(sizeof(kept) <= decode_shape::kBlockBytes);
  const auto block = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    const int items = rows.batch * rows.items_per_row, of_item = blocks_of_item(rows, params.blocks);
    const int number = min(block / max(of_item, 1), items - 1), row = number / rows.items_per_row;
    const Item item(params, row, number - row * rows.items_per_row);
    kept.b = item.b;
    kept.head = item.head;
    kept.first_head = item.first_head;
    kept.heads = item.heads;
    kept.of_item = of_item;
    kept.part = block - number * of_item;
    kept.place = block;
    kept.at = 0;
    kept.last = 0;
  }
  __syncthreads();
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();  // after the wait: what starts then reads counts that earlier kernels wrote

  Piece<typename Rows::Counts> piece{kept.b, kept.head, kept.first_head, kept.heads, 0, 0, {}};
  piece.counts = rows.count(piece.b);
  const int of_item = kept.of_item;
  const Load load = measure(rows, piece.counts);
  std::uint32_t at = 0, last = 0;  // in the line
  if (stay_apart(load, params.blocks, of_item, MinTiles)) {
    const auto part = static_cast<std::uint32_t>(kept.part);
    const Shares shares(static_cast<std::uint32_t>(rows.tiles(piece.counts)), static_cast<std::uint32_t>(of_item),
                        MinTiles);
    if (part >= shares.count) {
      return;
    }
    piece.first = static_cast<int>(shares.first(part));
    piece.end = static_cast<int>(shares.first(part + 1));
  } else {
    const Shares shares(load.total, static_cast<std::uint32_t>(params.blocks), MinTiles);
    if (static_cast<std::uint32_t>(block) >= shares.count) {
      return;
    }
    at = shares.first(static_cast<std::uint32_t>(block));
    last = shares.first(static_cast<std::uint32_t>(block) + 1);
  }
  do {
    if (at < last) {
      const RowPlace row = find_row(rows, at);
      piece.counts = rows.count(row.b);
      const auto of_row = static_cast<std::uint32_t>(rows.tiles(piece.counts));
      const std::uint32_t in_row = (at - row.first) / of_row, first = at - row.first - in_row * of_row;
      const Item item(params, row.b, static_cast<int>(in_row));
      piece = {item.b,
               item.head,
               item.first_head,
               item.heads,
               static_cast<int>(first),
               static_cast<int>(min(of_row, first + last - at)),
               piece.counts};
      at += static_cast<std::uint32_t>(piece.end - piece.first);
      __syncthreads();  // the piece before has been merged
      if (threadIdx.x == 0) {
        kept.heads = item.heads;
        kept.place = block + row.b * rows.items_per_row + item.in_row;
        kept.at = at;
        kept.last = last;
      }
    }
    WarpState<D> state;
    attend(state, piece);
    leave_state(state, reinterpret_cast<float*>(shared + threadIdx.x / 32 * warp_bytes));
    __syncthreads();
    at = kept.at;
    last = kept.last;
    merge_states<D, Warps>(reinterpret_cast<const float*>(shared), warp_bytes / static_cast<int>(sizeof(float)),
                           kept.heads, params.partials, kept.place);
  } while (at < last);
}

}  // namespace zipvl::cuda::decode
