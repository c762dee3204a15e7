// Who works on what, by the lengths that only the device knows: what is allocated but unused costs nothing. An item is
// a (batch row, key/value head, chunk of query heads). There are two forms:
//
//   apart        every item has as many blocks of threads to itself as every other one, and its tiles are shared out
//                among them: a block has one piece and leaves one partial result. Taken where no block gets much more
//                to do than on an average.
//   in one line  all tiles of all items stand in one line, of which every block gets an equal share: no block idles
//                because a row is short. A share crosses items, and leaves a partial result of each. For rows of very
//                different lengths, and for more items than blocks.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/common/warp.cuh"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/sync.cuh"

namespace zipvl::cuda::decode {

// Tiles of row b, from the device's counts.
struct RowTiles {
  const std::int32_t* counts;  // [batch]: tokens, or blocks of tokens
  std::int64_t stride;
  int most;  // counts are clamped to [0, most]
  int tile;  // of the counts' units in a tile
  int batch, items_per_row;

  // What is read of a row's counts: past the first-level cache, for the combining kernel reads them before it waits.
  using Counts = int;
  __device__ __forceinline__ Counts count(int b) const { return min(max(__ldcg(counts + b * stride), 0), most); }
  __device__ __forceinline__ int tiles(Counts count) const { return (count + tile - 1) / tile; }
};

// `total` tiles in consecutive shares, one a block of threads.
struct Shares {
  std::uint32_t count;         // that have tiles
  std::uint32_t base, longer;  // each has `base` tiles, and the first `longer` ones one more

  // least: tiles that a block is worth starting for; most: blocks that there are.
  __device__ __forceinline__ Shares(std::uint32_t total, std::uint32_t most, std::uint32_t least)
      : count(min(most, (total + least - 1) / least)) {
    const std::uint32_t among = max(count, 1U);
    base = total / among;
    longer = total - base * among;
  }

  // Share `i` is tiles [first(i), first(i + 1)).
  __device__ __forceinline__ std::uint32_t first(std::uint32_t i) const { return base * i + min(i, longer); }
  // The share that has tile x.
  __device__ __forceinline__ std::uint32_t owner(std::uint32_t x) const {
    const std::uint32_t turn = longer * (base + 1);
    return x < turn ? x / (base + 1) : longer + (x - turn) / base;
  }
};

// Tiles of everything.
struct Load {
  std::uint32_t total;    // below 2**31
  std::uint32_t largest;  // of an item
};

// Every lane of a warp calls. Rows here and below: RowTiles, or what has its Counts, count(b), tiles(counts), batch and
// items_per_row. counts: of any row.
template <typename Rows>
__device__ __forceinline__ Load measure(const Rows& rows, const typename Rows::Counts& counts) {
  if (rows.batch == 1) {
    const auto tiles = static_cast<std::uint32_t>(rows.tiles(counts));
    return {tiles * static_cast<std::uint32_t>(rows.items_per_row), tiles};
  }
  std::uint32_t total = 0, largest = 0;
#pragma unroll 1
  for (int b = static_cast<int>(threadIdx.x % 32); b < rows.batch; b += 32) {
    const auto tiles = static_cast<std::uint32_t>(rows.tiles(rows.count(b)));
    total += tiles;
    largest = max(largest, tiles);
  }
  return {__reduce_add_sync(0xFFFFFFFFU, total) * static_cast<std::uint32_t>(rows.items_per_row),
          __reduce_max_sync(0xFFFFFFFFU, largest)};
}

// Blocks that an item has to itself, if any.
template <typename Rows>
__device__ __forceinline__ int blocks_of_item(const Rows& rows, int blocks) {
  return blocks / (rows.batch * rows.items_per_row);
}

// Whether items stay apart: the largest share is then at most an eighth and `slack` tiles, about what a second piece
// costs a block, above the average.
__device__ __forceinline__ bool stay_apart(const Load& load, int blocks, int of_item, int slack) {
  const auto all = static_cast<std::uint64_t>(blocks);
  return of_item > 0 && load.largest * all * 8 <= of_item * (std::uint64_t{load.total} * 9 + slack * all * 8);
}

// Row `b`, whose tiles begin at `first` in the line.
struct RowPlace {
  int b;
  std::uint32_t first;
};

// The row that has tile x of the line; every lane of a warp calls with the same x, which is less than the total.
template <typename Rows>
__device__ __forceinline__ RowPlace find_row(const Rows& rows, std::uint32_t x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::uint32_t before = 0;
#pragma unroll 1
  for (int base = 0; base < rows.batch; base += 32) {
    const std::uint32_t own = base + lane < rows.batch
                                  ? static_cast<std::uint32_t>(rows.tiles(rows.count(base + lane)) * rows.items_per_row)
                                  : 0;
    std::uint32_t end = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint32_t other = __shfl_up_sync(0xFFFFFFFFU, end, offset);
      end += lane >= offset ? other : 0;
    }
    end += before;
    const unsigned past = __ballot_sync(0xFFFFFFFFU, x < end);
    if (past != 0) {
      const int found = __ffs(static_cast<int>(past)) - 1;
      return {base + found, __shfl_sync(0xFFFFFFFFU, end - own, found)};
    }
    before = __shfl_sync(0xFFFFFFFFU, end, 31);
  }
  return {rows.batch, before};
}

// Where row b's tiles begin in the line.
template <typename Rows>
__device__ __forceinline__ std::uint32_t row_first(const Rows& rows, int b) {
  std::uint32_t before = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x % 32); i < b; i += 32) {
    before += static_cast<std::uint32_t>(rows.tiles(rows.count(i)));
  }
  return __reduce_add_sync(0xFFFFFFFFU, before) * static_cast<std::uint32_t>(rows.items_per_row);
}

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
