// A block's share of one kind of tiles, item by item.
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

// Partial results of the kind of tiles begin at `first_place`. attend(state, q, piece): the calling warp's part of a
// piece.
template <typename Element, int D, int Warps, typename Attend>
__device__ __forceinline__ void walk(const DecodeAttnParams& params, const RowTiles& tiles, int block,
                                     std::int64_t first_place, float* shared, const Attend& attend) {
  const Share share = make_share(tiles, params.blocks, Warps);
  if (block >= static_cast<int>(share.blocks)) {
    return;
  }
  const int group = static_cast<int>(params.query_heads) / static_cast<int>(params.kv_heads);
  const std::uint32_t last = share.first(static_cast<std::uint32_t>(block) + 1);
  for (std::uint32_t at = share.first(static_cast<std::uint32_t>(block)); at < last;) {
    const RowPlace row = find_row(tiles, at);
    const auto of_row = static_cast<std::uint32_t>(tiles.tiles(row.b));
    const int in_row = static_cast<int>((at - row.first) / of_row);
    const std::uint32_t first_tile = (at - row.first) % of_row, tiles_here = min(of_row - first_tile, last - at);
    const int first = static_cast<int>(first_tile), end = static_cast<int>(first_tile + tiles_here);
    const int head = in_row / params.head_chunks, chunk = in_row % params.head_chunks;
    const int first_head = head * group + chunk * kDecodeHeads;

    std::uint32_t q[D / 16][2];
    load_queries<Element, D>(
        q, static_cast<const Element*>(params.q) + row.b * params.q_stride[0] + first_head * params.q_stride[1],
        params.q_stride[1], group - chunk * kDecodeHeads);
    WarpState<D> state;
    attend(state, q, Piece{row.b, head, first, end});
    __syncthreads();
    const std::int64_t item = static_cast<std::int64_t>(row.b) * tiles.items_per_row + in_row;
    merge_warps<D, Warps>(state, shared, params.partials, first_place + block + item);
    at += tiles_here;
  }
}

}  // namespace zipvl::cuda::decode
