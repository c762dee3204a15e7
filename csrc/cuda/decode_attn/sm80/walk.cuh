// A block's share of the tiles, item by item.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/merge.cuh"
#include "cuda/decode_attn/schedule.cuh"
#include "cuda/decode_attn/warp_state.cuh"

namespace zipvl::cuda::decode {

// Tiles [first, end) of batch row b and key/value head `head`.
struct Piece {
  int b, head, first, end;
};

// attend(state, q, piece): the calling warp's part of a piece.
template <typename Element, int D, int Warps, typename Rows, typename Attend>
__device__ __forceinline__ void walk(const DecodeAttnParams& params, const Rows& tiles, float* shared,
                                     const Attend& attend) {
  const auto block = static_cast<int>(blockIdx.x);
  const int group = static_cast<int>(params.query_heads) / static_cast<int>(params.kv_heads);
  const Share share = make_share(tiles, params.blocks, Warps);
  if (block >= static_cast<int>(share.blocks)) {
    return;
  }
  __shared__ volatile std::uint32_t kept[3];  // what would cost registers through attend()
  std::uint32_t at = share.first(static_cast<std::uint32_t>(block));
  std::uint32_t last = share.first(static_cast<std::uint32_t>(block) + 1);
  do {
    const RowPlace row = find_row(tiles, at);
    const auto of_row = static_cast<std::uint32_t>(tiles.tiles(row.b));
    const int in_row = static_cast<int>((at - row.first) / of_row);
    const std::uint32_t first_tile = (at - row.first) % of_row, tiles_here = min(of_row - first_tile, last - at);
    const int first = static_cast<int>(first_tile), end = static_cast<int>(first_tile + tiles_here);
    const int head = in_row / params.head_chunks, chunk = in_row % params.head_chunks;
    const int first_head = head * group + chunk * kDecodeHeads;
    if (threadIdx.x == 0) {
      kept[0] = at + tiles_here;
      kept[1] = last;
      kept[2] = static_cast<std::uint32_t>(block + row.b * tiles.items_per_row + in_row);
    }

    std::uint32_t q[D / 16][2];
    load_queries<Element, D>(
        q, static_cast<const Element*>(params.q) + row.b * params.q_stride[0] + first_head * params.q_stride[1],
        params.q_stride[1], group - chunk * kDecodeHeads);
    WarpState<D> state;
    attend(state, q, Piece{row.b, head, first, end});
    __syncthreads();
    at = kept[0];
    last = kept[1];
    // Its barriers come before the next write to `kept`.
    merge_warps<D, Warps>(state, shared, params.partials, kept[2]);
  } while (at < last);
}

}  // namespace zipvl::cuda::decode
