// Online softmax over the score tiles of a warpgroup (Milakov and Gimelshein, arXiv 1805.02867), in registers. A thread
// holds parts of two rows, 8 apart; the four lanes of a quad share a row.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::attn::sm90 {

struct RowState {
  float max[2], sum[2];  // of the scores so far (unscaled), and of this thread's weights relative to that maximum
};

// Scores [64, kBlockN] of packed keys from `first_column` on -> weights exp2(scale_log2 * (score - max)), in place.
// rescale: what sums and outputs so far must be multiplied by, as the maximum moved. limit: how many packed keys the
// rows see.
template <bool kMasked, int kScores>
__device__ __forceinline__ void weigh(float (&s)[kScores], RowState& rows, float (&rescale)[2], float scale_log2,
                                      const int (&limit)[2], int first_column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kMasked) {
      const int left = limit[i] - first_column - 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c >= left) {
            s[4 * j + 2 * i + c] = -INFINITY;
          }
        }
      }
    }
    float most = rows.max[i];
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      most = fmaxf(most, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    }
    most = quad_max(most);
    const float base = most == -INFINITY ? 0.0F : most * scale_log2;  // nothing seen yet: every weight is 0
    rescale[i] = ptx::exp2(rows.max[i] * scale_log2 - base);
    rows.max[i] = most;
    float sum = 0.0F;
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      float& a = s[4 * j + 2 * i];
      float& b = s[4 * j + 2 * i + 1];
      a = ptx::exp2(fmaf(a, scale_log2, -base));
      b = ptx::exp2(fmaf(b, scale_log2, -base));
      sum += a + b;
    }
    rows.sum[i] = fmaf(rows.sum[i], rescale[i], sum);
  }
}

// Weights as the A operand of the second product: fragment k holds columns 16 k to 16 k + 15.
template <typename Element, int kScores>
__device__ __forceinline__ void to_fragments(const float (&s)[kScores], std::uint32_t (&p)[kScores / 8][4]) {
#pragma unroll
  for (int k = 0; k < kScores / 8; ++k) {
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      p[k][f] = pack_pair<Element>(s[8 * k + 2 * f], s[8 * k + 2 * f + 1]);
    }
  }
}

// The maximum seldom moves after the first blocks: a warp in which none did skips the multiplications.
template <int kOutputs>
__device__ __forceinline__ void rescale_output(float (&o)[kOutputs], const float (&rescale)[2]) {
  if (__any_sync(0xFFFFFFFFU, rescale[0] != 1.0F || rescale[1] != 1.0F)) {
#pragma unroll
    for (int j = 0; j < kOutputs / 4; ++j) {
      o[4 * j] *= rescale[0];
      o[4 * j + 1] *= rescale[0];
      o[4 * j + 2] *= rescale[1];
      o[4 * j + 3] *= rescale[1];
    }
  }
}

}  // namespace zipvl::cuda::attn::sm90
