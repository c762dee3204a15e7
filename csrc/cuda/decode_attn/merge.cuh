// The warps of a block put their results together, in a fixed order, and write the block's partial result of an item.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode {

// What a warp leaves in its own shared memory, in floats: outputs [heads][D + 4] (4: rows of heads 2 j fall on
// different banks), then the heads' maxima and sums.
template <int D>
constexpr int kMergeRow = D + 4;
template <int D>
constexpr int kMergeBytes = kDecodeHeads * (kMergeRow<D> + 2) * static_cast<int>(sizeof(float));

// `own`: kMergeBytes of the calling warp's, which has nothing under way there. A barrier of the block must follow.
template <int D>
__device__ __forceinline__ void leave_state(const WarpState<D>& state, float* own) {
  const int lane = static_cast<int>(threadIdx.x % 32), i = lane / 4, j = lane % 4;
  float* sums = own + kDecodeHeads * kMergeRow<D>;
  __syncwarp();
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
      sums[2 * j + h] = state.most[h];
      sums[2 * j + h + kDecodeHeads] = total;
    }
  }
}

// Writes partial result `place` of `heads` heads. Every thread of the block calls; `first`: of the first warp's shared
// memory, `stride` floats before the next one's.
template <int D, int Warps>
__device__ __forceinline__ void merge_states(const float* first, int stride, int heads, const DecodePartials& partials,
                                             std::int64_t place) {
  constexpr int kLanes = D / 4;  // of a head, four channels each
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < heads * kLanes; at += Warps * 32) {
    const int head = at / kLanes, lane = at % kLanes;
    const float* sums = first + kDecodeHeads * kMergeRow<D> + head;
    const float* row = first + head * kMergeRow<D> + 4 * lane;
    float weights[Warps], most = kNone, total = 0.0F;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      weights[w] = sums[w * stride];
      most = fmaxf(most, weights[w]);
    }
    const float shift = most == kNone ? 0.0F : most;
    float4 sum{};
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      weights[w] = ptx::exp2(weights[w] - shift);
      total += weights[w] * sums[w * stride + kDecodeHeads];
      const float4 values = *reinterpret_cast<const float4*>(row + w * stride);
      sum.x += weights[w] * values.x;
      sum.y += weights[w] * values.y;
      sum.z += weights[w] * values.z;
      sum.w += weights[w] * values.w;
    }
    const float factor = 1.0F / total;
    const std::int64_t row_out = place * kDecodeHeads + head;
    reinterpret_cast<float4*>(partials.out)[row_out * kLanes + lane] = {sum.x * factor, sum.y * factor, sum.z * factor,
                                                                        sum.w * factor};
    if (lane == 0) {
      partials.lse[row_out] = most + log2f(total);
    }
  }
}

}  // namespace zipvl::cuda::decode
