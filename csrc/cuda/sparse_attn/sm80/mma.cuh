// The two products of a warp: scores of its query rows against a tile of keys, and weights times the tile's values.
#pragma once

#include <cstdint>

#include "cuda/ptx/mma.cuh"
#include "cuda/sparse_attn/sm80/load.cuh"
#include "cuda/sparse_attn/sm80/softmax.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::sm80 {

// Accumulators of a warp: [row tile][8-column tile][as mma_16x8x16's C].
template <typename Traits>
using Scores = float[Traits::kRowTiles][Traits::kBlockN / 8][4];
template <typename Traits>
using Output = float[Traits::kRowTiles][Traits::kHeadDim / 8][4];

// Shared addresses from which this lane reads its share of a warp's operands. Made anew for every tile: kept from tile
// to tile they and what the compiler makes of them would take registers that the sums need.
struct Operands {
  std::uint32_t q, k, v;

  template <typename Traits>
  __device__ __forceinline__ static Operands of(const SharedStorage<Traits>& shared) {
    const std::uint32_t thread = ptx::unhoisted(threadIdx.x);
    const int warp = thread / kWarpThreads, lane = thread % kWarpThreads;
    // ldmatrix: lanes 0-7 name the rows of the first matrix, and so on. K's rows are the product's columns, so its four
    // matrices are (columns 0-7, then 8-15) x (two chunks); Q's and V's go down the rows first.
    return {shared_address(shared.q) + Traits::offset(warp * 16 * Traits::kRowTiles + lane % 16, lane / 16),
            shared_address(shared.k) + Traits::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2),
            shared_address(shared.v) + Traits::offset(lane % 16, lane / 16)};
  }
};

template <typename Traits>
__device__ __forceinline__ void scores_of(Scores<Traits>& s, const Operands& at) {
  constexpr int kTileBytes = 16 * Traits::kRowBytes;
#pragma unroll
  for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
    std::uint32_t q[Traits::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
      ptx::ldmatrix(q[m], step_address<Traits>(at.q, step) + m * kTileBytes);
    }
#pragma unroll
    for (int n = 0; n < Traits::kBlockN / 16; ++n) {
      std::uint32_t k[4];
      ptx::ldmatrix(k, step_address<Traits>(at.k, step) + n * kTileBytes);
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ptx::mma_16x8x16<typename Traits::Element>(s[m][2 * n], q[m], k[0], k[1]);
        ptx::mma_16x8x16<typename Traits::Element>(s[m][2 * n + 1], q[m], k[2], k[3]);
      }
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void add_values(Output<Traits>& o, const Scores<Traits>& weights, const Operands& at) {
  using Element = typename Traits::Element;
  constexpr int kTileBytes = 16 * Traits::kRowBytes;
#pragma unroll
  for (int n = 0; n < Traits::kBlockN / 16; ++n) {
    std::uint32_t p[Traits::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const float (&pair)[4] = weights[m][2 * n + f / 2];
        p[m][f] = pack_pair<Element>(pair[f % 2 * 2], pair[f % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      std::uint32_t v[4];
      ptx::ldmatrix_transposed(v, step_address<Traits>(at.v, step) + n * kTileBytes);
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ptx::mma_16x8x16<Element>(o[m][2 * step], p[m], v[0], v[1]);
        ptx::mma_16x8x16<Element>(o[m][2 * step + 1], p[m], v[2], v[3]);
      }
    }
  }
}

}  // namespace zipvl::cuda::sm80
