// The warps of a block put their results together, in a fixed order, and write the block's partial result of an item.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/warp_state.cuh"

namespace zipvl::cuda::decode {

// Shared memory of the merge, in floats: outputs [warps][heads][D + 4] (4: rows of heads 2 j fall on different banks),
// maxima, sums and weights [heads][warps].
template <int D>
constexpr int kMergeRow = D + 4;
template <int D>
constexpr int merge_floats(int warps) {
  return warps * kDecodeHeads * (kMergeRow<D> + 3);
}

// Every thread of the block calls; `shared` is free before and after. `place`: of the partial result.
template <int D, int Warps>
__device__ __forceinline__ void merge_warps(WarpState<D>& state, float* shared, const DecodePartials& partials,
                                            std::int64_t place) {
  constexpr int kPairs = Warps * kDecodeHeads;
  static_assert(32 % Warps == 0);
  constexpr unsigned kActive = kPairs < 32 ? (1U << kPairs % 32) - 1 : 0xFFFFFFFFU;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int i = lane / 4, j = lane % 4;
  float* maxima = shared + kPairs * kMergeRow<D>;
  float *sums = maxima + kPairs, *weights = sums + kPairs;
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
      maxima[(2 * j + h) * Warps + warp] = state.most[h];
      sums[(2 * j + h) * Warps + warp] = total;
    }
  }
  __syncthreads();
  // What a warp's outputs of a head count: a thread a pair of them, the warps of a head side by side.
  for (int pair = thread; pair < kPairs; pair += Warps * 32) {
    float most = maxima[pair];
#pragma unroll
    for (int offset = 1; offset < Warps; offset *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kActive, most, offset));
    }
    const float weight = ptx::exp2(maxima[pair] - (most == kNone ? 0.0F : most));
    float sum = weight * sums[pair];
#pragma unroll
    for (int offset = 1; offset < Warps; offset *= 2) {
      sum += __shfl_xor_sync(kActive, sum, offset);
    }
    weights[pair] = weight / sum;
    if (pair % Warps == 0) {
      partials.lse[place * kDecodeHeads + pair / Warps] = most + log2f(sum);
    }
  }
  __syncthreads();
  for (int at = thread; at < kDecodeHeads * D; at += Warps * 32) {
    const int head = at / D, d = at % D;
    float value = 0.0F;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      value += weights[head * Warps + w] * shared[(w * kDecodeHeads + head) * kMergeRow<D> + d];
    }
    partials.out[place * kDecodeHeads * D + at] = value;
  }
  __syncthreads();
}

}  // namespace zipvl::cuda::decode
