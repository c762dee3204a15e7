// The two products of a warp: scores of its query rows against a tile of keys, and weights times the tile's values.
#pragma once

#include <cstdint>

#include "cuda/ptx/mma.cuh"
#include "cuda/sparse_attn/sm80/load.cuh"
#include "cuda/sparse_attn/sm80/softmax.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::attn::sm80 {

// Accumulators of a warp: [row tile][8-column tile][as mma_16x8x16's C].
template <typename Traits>
using Scores = float[Traits::kRowTiles][Traits::kBlockN / 8][4];
template <typename Traits>
using Output = float[Traits::kRowTiles][Traits::kHeadDim / 8][4];

// Shared addresses from which this lane reads its share of a warp's operands.
struct Operands {
  std::uint32_t q, k, v;

  template <typename Traits>
  __device__ __forceinline__ static Operands of(const SharedStorage<Traits>& shared, int tile) {
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    // ldmatrix: lanes 0-7 name the rows of the first matrix, and so on. K's rows are the product's columns, so its four
    // matrices are (columns 0-7, then 8-15) x (two chunks); Q's and V's go down the rows first.
    return {
        ptx::shared_address(shared.q) + Traits::offset(warp * 16 * Traits::kRowTiles + lane % 16, lane / 16),
        ptx::shared_address(shared.k[tile % Traits::kStages]) + Traits::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2),
        ptx::shared_address(shared.v[tile % Traits::kStages]) + Traits::offset(lane % 16, lane / 16)};
  }
};

template <typename Traits>
__device__ __forceinline__ void scores_of(Scores<Traits>& s, const Operands& at) {
  constexpr int kTileBytes = 16 * Traits::kRowBytes, kPeriodBytes = Traits::kPeriodChunks * kChunkBytes;
#pragma unroll Traits::kPeriodsAtOnce
  for (int byte = 0; byte < Traits::kRowBytes; byte += kPeriodBytes) {
#pragma unroll
    for (int step = 0; step < Traits::kPeriodChunks / 2; ++step) {
      std::uint32_t q[Traits::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ptx::ldmatrix(q[m], step_address<Traits>(at.q, step) + byte + m * kTileBytes);
      }
#pragma unroll
      for (int n = 0; n < Traits::kBlockN / 16; ++n) {
        std::uint32_t k[4];
        ptx::ldmatrix(k, step_address<Traits>(at.k, step) + byte + n * kTileBytes);
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          ptx::mma_16x8x16<typename Traits::Element>(s[m][2 * n], q[m], k[0], k[1]);
          ptx::mma_16x8x16<typename Traits::Element>(s[m][2 * n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }
}

// Scores become weights 16 columns at a time, so that exponentials and products of different columns can run at once.
template <typename Traits>
__device__ __forceinline__ void add_values(Output<Traits>& o, const Scores<Traits>& s,
                                           RowState<Traits::kRowTiles>& rows, float scale_log2, const Operands& at) {
  using Element = typename Traits::Element;
  constexpr int kTileBytes = 16 * Traits::kRowBytes;
#pragma unroll
  for (int n = 0; n < Traits::kBlockN / 16; ++n) {
    std::uint32_t p[Traits::kRowTiles][4];
    weigh<Element>(p, s, n, rows, scale_log2);
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      std::uint32_t v[4];
      ptx::ldmatrix_trans(v, step_address<Traits>(at.v, step) + n * kTileBytes);
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ptx::mma_16x8x16<Element>(o[m][2 * step], p[m], v[0], v[1]);
        ptx::mma_16x8x16<Element>(o[m][2 * step + 1], p[m], v[2], v[3]);
      }
    }
  }
}

}  // namespace zipvl::cuda::attn::sm80
