// Attention of one new token to a cache in full precision. A warp walks tiles of 16 tokens on its own: a private ring
// of buffers, filled by cp.async, and no barrier of the block until its item is done.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/sm80/tile.cuh"
#include "cuda/decode_attn/sm80/walk.cuh"
#include "cuda/ptx/sync.cuh"

namespace zipvl::cuda::decode {

__device__ __forceinline__ RowTiles row_tiles(const DecodeAttnParams& params) {
  return {params.lengths, params.lengths_stride,          static_cast<int>(params.slots),
          kTileTokens,    static_cast<int>(params.batch), static_cast<int>(params.kv_heads) * params.head_chunks};
}

// A warp's tiles first + warp, first + warp + Warps, ... before end, through a ring of Stages buffers at `ring`, its
// own. fetch(buffer, tile) starts a tile's copies; attend(buffer, tile) works on it.
template <int Warps, int Stages, int Bytes, typename Fetch, typename Attend>
__device__ __forceinline__ void stream_tiles(std::uint32_t ring, int first, int end, const Fetch& fetch,
                                             const Attend& attend) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  int fetched = first + warp, slot = 0;
  const auto fetch_next = [&](int into) {
    if (fetched < end) {
      fetch(ring + into * Bytes, fetched);
    }
    ptx::cp_async_commit();
    fetched += Warps;
  };
#pragma unroll
  for (int stage = 0; stage < Stages - 1; ++stage) {
    fetch_next(stage);
  }
  for (int tile = first + warp; tile < end; tile += Warps) {
    ptx::cp_async_wait<Stages - 2>();
    __syncwarp();
    fetch_next(slot == 0 ? Stages - 1 : slot - 1);
    attend(ring + slot * Bytes, tile);
    slot = slot + 1 == Stages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
}

// The head of a piece in the cache in full precision.
template <typename Element>
__device__ __forceinline__ HeadRows<Element> head_rows(const DecodeAttnParams& params, const Piece& piece, int length) {
  return {static_cast<const Element*>(params.k) + piece.b * params.k_stride[0] + piece.head * params.k_stride[1],
          static_cast<const Element*>(params.v) + piece.b * params.v_stride[0] + piece.head * params.v_stride[1],
          params.k_stride[2], params.v_stride[2], length};
}

template <typename Element, int D, int Warps, int Stages>
__global__ void __launch_bounds__(Warps * 32) decode_attn_kernel(const __grid_constant__ DecodeAttnParams params) {
  using Tile = KvTile<Element, D>;
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();  // after the wait: what starts then reads counts that earlier kernels wrote
  const RowTiles tiles = row_tiles(params);
  const std::uint32_t ring = ptx::shared_address(shared) + threadIdx.x / 32 * (Stages * Tile::kBytes);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  walk<Element, D, Warps>(
      params, tiles, reinterpret_cast<float*>(shared),
      [&](WarpState<D>& state, const std::uint32_t (&q)[D / 16][2], const Piece& piece) {
        const HeadRows<Element> rows = head_rows<Element>(params, piece, tiles.count(piece.b));
        stream_tiles<Warps, Stages, Tile::kBytes>(
            ring, piece.first, piece.end,
            [&](std::uint32_t buffer, int tile) { Tile::fetch(buffer, rows, tile * kTileTokens, lane); },
            [&](std::uint32_t buffer, int tile) {
              Tile::attend(state, q, buffer, rows.length - tile * kTileTokens, params.scale_log2, lane);
            });
      });
}

}  // namespace zipvl::cuda::decode
