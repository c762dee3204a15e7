// Attention of one new token to a cache in full precision. A warp takes tiles of 16 tokens on its own, through a
// private ring of buffers filled by cp.async; the block has no barrier until its split is done.
#pragma once

#include <cstdint>

#include "cuda/common/smem_layout.cuh"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/schedule.cuh"
#include "cuda/decode_attn/shape.h"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode_attn::sm80 {

// The keys and values of one head.
template <typename ElementType>
struct HeadRows {
  const ElementType *k, *v;  // [slots, D]
  std::int64_t k_stride, v_stride;
  int length;  // rows that may be read
};

// 16 tokens of one head's keys and values in shared memory: fetched by one warp, attended to by it.
template <typename ElementType, int D>
struct KvTile {
  using Rows = SwizzledRows<D>;
  static constexpr int kRowsBytes = kTileTokens * Rows::kRowBytes;
  static constexpr int kBytes = 2 * kRowsBytes;  // keys, then values

  // Starts copying rows [first, first + 16) of keys and values; rows past the length become zeros and are not read.
  static __device__ __forceinline__ void fetch(std::uint32_t target, const HeadRows<ElementType>& rows, int first,
                                               int lane) {
    constexpr int kPieces = Rows::kPieces;
    if constexpr (kWarpThreads % kPieces == 0) {  // a lane has the same piece of every row
      constexpr int kStep = kWarpThreads / kPieces;
      const int row = lane / kPieces, piece = lane % kPieces;
      const ElementType* k = rows.k + (first + row) * rows.k_stride + piece * kPieceElements;
      const ElementType* v = rows.v + (first + row) * rows.v_stride + piece * kPieceElements;
#pragma unroll
      for (int step = 0; step < kTileTokens; step += kStep) {
        fetch_piece(target + Rows::offset(row + step, piece), k + step * rows.k_stride, v + step * rows.v_stride,
                    first + row + step < rows.length);
      }
    } else {
#pragma unroll
      for (int at = lane; at < kTileTokens * kPieces; at += kWarpThreads) {
        const int row = at / kPieces, piece = at % kPieces;
        fetch_piece(target + Rows::offset(row, piece), rows.k + (first + row) * rows.k_stride + piece * kPieceElements,
                    rows.v + (first + row) * rows.v_stride + piece * kPieceElements, first + row < rows.length);
      }
    }
  }

  static __device__ __forceinline__ void fetch_piece(std::uint32_t target, const ElementType* k, const ElementType* v,
                                                     bool valid) {
    ptx::cp_async_16(target, k, valid);
    ptx::cp_async_16(target + kRowsBytes, v, valid);
  }

  // q: as of Queries::load_tiles. `valid`: how many of the tile's tokens there are; at least one.
  static __device__ __forceinline__ void attend(WarpState<D>& state, const std::uint32_t (&q)[D / 32][4],
                                                std::uint32_t tile, int valid, float scale_log2, int lane) {
    const int matrix = lane / 8;
    float s[1][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      std::uint32_t keys[4];
      ptx::ldmatrix(keys, tile + Rows::offset(lane % 8 + matrix % 2 * 8, 2 * k + matrix / 2));
      ptx::mma_16x8x16<ElementType>(s[0], keys, q[k / 2][k % 2 * 2], q[k / 2][k % 2 * 2 + 1]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s[0][c] = lane / 4 + c / 2 * 8 < valid ? s[0][c] * scale_log2 : kMinusInfinity;
    }
    state.online_softmax(s);
    std::uint32_t weights[2];
    weights_operand<ElementType>(weights, s[0]);
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      std::uint32_t values[4];
      ptx::ldmatrix_trans(values, tile + kRowsBytes + Rows::offset(lane % 8 + matrix / 2 * 8, 2 * m + matrix % 2));
      ptx::mma_16x8x16<ElementType>(state.out[m], values, weights[0], weights[1]);
    }
  }
};

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
  int tile = first + static_cast<int>(threadIdx.x / kWarpThreads);
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

// The head of a split in the cache in full precision.
template <typename ElementType, typename Split>
__device__ __forceinline__ HeadRows<ElementType> head_rows(const DecodeAttnParams& params, const Split& split,
                                                           int length) {
  return {static_cast<const ElementType*>(params.k) + split.b * params.k_stride[0] + split.head * params.k_stride[1],
          static_cast<const ElementType*>(params.v) + split.b * params.v_stride[0] + split.head * params.v_stride[1],
          params.k_stride[2], params.v_stride[2], length};
}

// The query heads of a split, into a warp's shared memory.
template <typename ElementType, int D, typename Split>
__device__ __forceinline__ void fetch_queries(std::uint32_t target, const DecodeAttnParams& params, const Split& split,
                                              int lane) {
  Queries<ElementType, D>::fetch(
      target,
      static_cast<const ElementType*>(params.q) + split.b * params.q_stride[0] + split.first_head * params.q_stride[1],
      params.q_stride[1], split.heads, lane);
}

template <typename ElementType, int D, int Warps, int Stages>
__global__ void __launch_bounds__(Warps* kWarpThreads)
    decode_attn_kernel(const __grid_constant__ DecodeAttnParams params) {
  using Tile = KvTile<ElementType, D>;
  constexpr int kQueryBytes = query_bytes(D), kWarpBytes = kQueryBytes + Stages * Tile::kBytes;
  static_assert(kWarpBytes >= kMergeBytes<D>);
  extern __shared__ __align__(128) unsigned char shared[];
  const RowTiles tiles = row_tiles(params);
  const std::uint32_t queries = ptx::shared_address(shared) + threadIdx.x / kWarpThreads * kWarpBytes;
  const auto lane = static_cast<int>(threadIdx.x % kWarpThreads);
  for_each_split<D, Warps, Warps>(params, tiles, shared, kWarpBytes, [&](WarpState<D>& state, const auto& split) {
    const HeadRows<ElementType> rows = head_rows<ElementType>(params, split, split.counts);
    std::uint32_t q[D / 32][4];
    fetch_queries<ElementType, D>(queries, params, split, lane);
    stream_tiles<Warps, Stages, Tile::kBytes>(
        queries + kQueryBytes, split.first, split.end,
        [&](std::uint32_t buffer, int tile) { Tile::fetch(buffer, rows, tile * kTileTokens, lane); },
        [&] {
#pragma unroll
          for (int pair = 0; pair < D / 32; ++pair) {
            Queries<ElementType, D>::load_tiles(q[pair], queries, pair, lane);
          }
        },
        [&](std::uint32_t buffer, int tile) {
          Tile::attend(state, q, buffer, rows.length - tile * kTileTokens, params.scale_log2, lane);
        });
  });
}

}  // namespace zipvl::cuda::decode_attn::sm80
