// The warps of a block put their results together, in a fixed order, and write the block's partial result of an item.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/warp_state.cuh"

namespace zipvl::cuda::decode {

// Shared memory of the merge, in floats: outputs [warps][heads][D + 4] (4: rows of heads 2 j fall on different banks),
// maxima and sums [warps][heads].
template <int D>
constexpr int kMergeRow = D + 4;
template <int D>
constexpr int merge_floats(int warps) {
  return warps * kDecodeHeads * (kMergeRow<D> + 2);
}

// Every thread of the block calls; `shared` is free before and after. `place`: of the partial result.
template <int D, int Warps>
__device__ __forceinline__ void merge_warps(WarpState<D>& state, float* shared, const DecodePartials& partials,
                                            std::int64_t place) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int i = lane / 4, j = lane % 4;
  float* maxima = shared + Warps * kDecodeHeads * kMergeRow<D>;
  float* sums = maxima + Warps * kDecodeHeads;
  float* own = shared + warp * kDecodeHeads * kMergeRow<D>;
#pragma unroll
  for (int m = 0; m < D / 16; ++m) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      own[(2 * j + c % 2) * kMergeRow<D> + 16 * m + i + c / 2 * 8] = state.out[m][c];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = column_sum(state.sum[h]);
    if (i == 0) {
      maxima[warp * kDecodeHeads + 2 * j + h] = state.most[h];
      sums[warp * kDecodeHeads + 2 * j + h] = total;
    }
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kDecodeHeads * D; at += Warps * 32) {
    const int head = at / D, d = at % D;
    float most = kNone;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      most = fmaxf(most, maxima[w * kDecodeHeads + head]);
    }
    const float shift = most == kNone ? 0.0F : most;
    float sum = 0.0F, value = 0.0F;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      const float weight = ptx::exp2(maxima[w * kDecodeHeads + head] - shift);
      sum += weight * sums[w * kDecodeHeads + head];
      value += weight * shared[(w * kDecodeHeads + head) * kMergeRow<D> + d];
    }
    partials.out[place * kDecodeHeads * D + at] = value / sum;
    if (d == 0) {
      partials.lse[place * kDecodeHeads + head] = most + log2f(sum);
    }
  }
  __syncthreads();
}

}  // namespace zipvl::cuda::decode
