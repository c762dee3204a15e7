// 16 tokens of one head's keys and values in shared memory: fetched by one warp, attended to by it.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/shape.h"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"

namespace zipvl::cuda::decode {

using decode_shape::kTileTokens;

// The keys and values of one head.
template <typename Element>
struct HeadRows {
  const Element *k, *v;  // [slots, D]
  std::int64_t k_stride, v_stride;
  int length;  // rows that may be read
};

template <typename Element, int D>
struct KvTile {
  static constexpr int kChunks = D / 8;  // of 16 bytes in a row
  static constexpr int kRowsBytes = kTileTokens * D * 2;
  static constexpr int kBytes = 2 * kRowsBytes;  // keys, then values

  // Bytes from the start to chunk `chunk` of row `row`. Chunks are permuted so that the eight rows that ldmatrix reads
  // at once fall on different banks; where a row is not a multiple of 128 bytes (D = 96), rows of either parity do
  // already.
  static __device__ __forceinline__ int place(int row, int chunk) {
    const int turn = kChunks % 8 == 0 ? row % 8 : row / 2 % 4;
    return row * D * 2 + (chunk ^ turn) * 16;
  }

  // Starts copying rows [first, first + 16) of keys and values; rows past the length become zeros and are not read.
  static __device__ __forceinline__ void fetch(std::uint32_t target, const HeadRows<Element>& rows, int first,
                                               int lane) {
    if constexpr (32 % kChunks == 0) {  // a lane has the same chunk of every row
      constexpr int kStep = 32 / kChunks;
      const int row = lane / kChunks, chunk = lane % kChunks;
      const Element* k = rows.k + (first + row) * rows.k_stride + chunk * 8;
      const Element* v = rows.v + (first + row) * rows.v_stride + chunk * 8;
#pragma unroll
      for (int step = 0; step < kTileTokens; step += kStep) {
        fetch_chunk(target + place(row + step, chunk), k + step * rows.k_stride, v + step * rows.v_stride,
                    first + row + step < rows.length);
      }
    } else {
#pragma unroll
      for (int at = lane; at < kTileTokens * kChunks; at += 32) {
        const int row = at / kChunks, chunk = at % kChunks;
        fetch_chunk(target + place(row, chunk), rows.k + (first + row) * rows.k_stride + chunk * 8,
                    rows.v + (first + row) * rows.v_stride + chunk * 8, first + row < rows.length);
      }
    }
  }

  static __device__ __forceinline__ void fetch_chunk(std::uint32_t target, const Element* k, const Element* v,
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
      ptx::ldmatrix(keys, tile + place(lane % 8 + matrix % 2 * 8, 2 * k + matrix / 2));
      ptx::mma_16x8x16<Element>(s[0], keys, q[k / 2][k % 2 * 2], q[k / 2][k % 2 * 2 + 1]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s[0][c] = lane / 4 + c / 2 * 8 < valid ? s[0][c] * scale_log2 : kNone;
    }
    state.weigh(s);
    std::uint32_t weights[2];
    weights_operand<Element>(weights, s[0]);
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      std::uint32_t values[4];
      ptx::ldmatrix_trans(values, tile + kRowsBytes + place(lane % 8 + matrix / 2 * 8, 2 * m + matrix % 2));
      ptx::mma_16x8x16<Element>(state.out[m], values, weights[0], weights[1]);
    }
  }
};

}  // namespace zipvl::cuda::decode
