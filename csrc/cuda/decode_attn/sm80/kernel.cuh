// Attention of one new token to a cache in full precision. A warp walks tiles of 16 tokens on its own: a private ring
// of buffers, filled by cp.async, and no barrier of the block until its item is done.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/sm80/tile.cuh"
#include "cuda/decode_attn/sm80/walk.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode {

__device__ __forceinline__ RowTiles row_tiles(const DecodeAttnParams& params) {
  return {params.lengths, params.lengths_stride,          static_cast<int>(params.slots),
          kTileTokens,    static_cast<int>(params.batch), static_cast<int>(params.kv_heads) * params.head_chunks};
}

// A warp's tiles first + warp, first + warp + Warps, ... before end, through a ring of Stages buffers at `ring`, its
// own. fetch(buffer, tile) starts a tile's copies; begin() is called when all copies started before the first are
// there; attend(buffer, tile) works on a tile.
template <int Warps, int Stages, int Bytes, typename Fetch, typename Begin, typename Attend>
__device__ __forceinline__ void stream_tiles(std::uint32_t ring, int first, int end, const Fetch& fetch,
                                             const Begin& begin, const Attend& attend) {
  int tile = first + static_cast<int>(threadIdx.x / 32);
  const auto fetch_into = [&](int slot, int fetched) {
    if (fetched < end) {
      fetch(ring + slot * Bytes, fetched);
    }
    ptx::cp_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < Stages; ++stage) {
    fetch_into(stage, tile + stage * Warps);
  }
  ptx::cp_async_wait<Stages - 1>();
  __syncwarp();
  begin();
  for (int slot = 0; tile < end; tile += Warps) {
    ptx::cp_async_wait<Stages - 1>();
    __syncwarp();
    attend(ring + slot * Bytes, tile);
    __syncwarp();
    fetch_into(slot, tile + Stages * Warps);
    slot = slot + 1 == Stages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
}

// The head of a piece in the cache in full precision.
template <typename Element, typename Piece>
__device__ __forceinline__ HeadRows<Element> head_rows(const DecodeAttnParams& params, const Piece& piece, int length) {
  return {static_cast<const Element*>(params.k) + piece.b * params.k_stride[0] + piece.head * params.k_stride[1],
          static_cast<const Element*>(params.v) + piece.b * params.v_stride[0] + piece.head * params.v_stride[1],
          params.k_stride[2], params.v_stride[2], length};
}

// The query heads of a piece, into a warp's shared memory.
template <typename Element, int D, typename Piece>
__device__ __forceinline__ void fetch_queries(std::uint32_t target, const DecodeAttnParams& params, const Piece& piece,
                                              int lane) {
  Queries<Element, D>::fetch(
      target,
      static_cast<const Element*>(params.q) + piece.b * params.q_stride[0] + piece.first_head * params.q_stride[1],
      params.q_stride[1], piece.heads, lane);
}

template <typename Element, int D, int Warps, int Stages>
__global__ void __launch_bounds__(Warps * 32) decode_attn_kernel(const __grid_constant__ DecodeAttnParams params) {
  using Tile = KvTile<Element, D>;
  constexpr int kQueryBytes = decode_shape::query_bytes(D), kWarpBytes = kQueryBytes + Stages * Tile::kBytes;
  static_assert(kWarpBytes >= kMergeBytes<D>);
  extern __shared__ __align__(128) unsigned char shared[];
  const RowTiles tiles = row_tiles(params);
  const std::uint32_t queries = ptx::shared_address(shared) + threadIdx.x / 32 * kWarpBytes;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  walk<D, Warps, Warps>(params, tiles, shared, kWarpBytes, [&](WarpState<D>& state, const auto& piece) {
    const HeadRows<Element> rows = head_rows<Element>(params, piece, piece.counts);
    std::uint32_t q[D / 32][4];
    fetch_queries<Element, D>(queries, params, piece, lane);
    stream_tiles<Warps, Stages, Tile::kBytes>(
        queries + kQueryBytes, piece.first, piece.end,
        [&](std::uint32_t buffer, int tile) { Tile::fetch(buffer, rows, tile * kTileTokens, lane); },
        [&] {
#pragma unroll
          for (int pair = 0; pair < D / 32; ++pair) {
            Queries<Element, D>::load_tiles(q[pair], queries, pair, lane);
          }
        },
        [&](std::uint32_t buffer, int tile) {
          Tile::attend(state, q, buffer, rows.length - tile * kTileTokens, params.scale_log2, lane);
        });
  });
}

}  // namespace zipvl::cuda::decode
