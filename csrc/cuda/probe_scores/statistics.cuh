// Both kernel families reduce a tile of scores in registers with this: row statistics (maximum, sum, log-sum-exp) in
// the first pass, column sums of weights in the second. A thread's s[4 * j + 2 * i + c] stands at row lane / 4 + 8 * i
// of its warp's 16 and column 8 * j + 2 * (lane % 4) + c: the accumulators of mma.sync and of wgmma.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::probe_scores {

// The base of scaled scores; a maximum over nothing counts as 0, so that nothing weighs 0 and not NaN.
__device__ __forceinline__ float scaled_max(float max, float scale_log2) {
  return max == -INFINITY ? 0.0F : max * scale_log2;
}

// First pass: this thread's share of two rows, over the keys so far. fmaxf passes over NaN; the sum keeps it.
struct RowStatistics {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0F, 0.0F};

  template <int kValues>
  __device__ __forceinline__ void add(const float (&s)[kValues], float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float new_max[2] = {max[i], s[2 * i + 1]};
#pragma unroll
      for (int j = 0; j < kValues / 4; ++j) {
        new_max[0] = fmaxf(new_max[0], s[4 * j + 2 * i]);
        new_max[1] = fmaxf(new_max[1], s[4 * j + 2 * i + 1]);
      }
      new_max[0] = fmaxf(new_max[0], new_max[1]);
      const float base = scaled_max(new_max[0], scale_log2);
      float total[2] = {sum[i] * ptx::exp2(fmaf(max[i], scale_log2, -base)), 0.0F};
      if (max[i] == -INFINITY) {
        total[0] = sum[i];  // 0, or NaN where every score so far was NaN
      }
      max[i] = new_max[0];
#pragma unroll
      for (int j = 0; j < kValues / 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          total[c] += ptx::exp2(fmaf(s[4 * j + 2 * i + c], scale_log2, -base));
        }
      }
      sum[i] = total[0] + total[1];
    }
  }

  // The whole row's, in all four lanes that share it.
  __device__ __forceinline__ void reduce(float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float row_max = quad_max(max[i]);
      const float base = scaled_max(row_max, scale_log2);
      const float share = max[i] == -INFINITY ? sum[i] : sum[i] * ptx::exp2(fmaf(max[i], scale_log2, -base));
      sum[i] = quad_sum(share);
      max[i] = row_max;
    }
  }
};

// Of a row whose 2**score sum to `sum` times 2**base over all keys. A sum of 0 over no key at all: weights of 0. Over
// keys whose every score is -inf (`sees`: there is a key): 0 / 0, as in any softmax.
__device__ __forceinline__ float log_sum_exp(float base, float sum, bool sees) {
  return sum == 0.0F ? (sees ? NAN : INFINITY) : base + log2f(sum);
}

// Scores of keys a row may not see become -inf. `limit`: the last key of each of the thread's two rows; `words`: which
// of the tile's keys are real, a bit each.
template <int kValues>
__device__ __forceinline__ void apply_mask(float (&s)[kValues], const int (&limit)[2], int first_key,
                                           const std::uint32_t (&words)[kValues / 16]) {
  const int column = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kValues / 4; ++j) {
    const std::uint32_t bits = words[j / 4] >> (8 * (j % 4) + column);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool real = (bits >> c) & 1U;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!real || first_key + column + 8 * j + c > limit[i]) {
          s[4 * j + 2 * i + c] = -INFINITY;
        }
      }
    }
  }
}

// Second pass: adds to `sum` the weights of the thread's two keys over the tile's rows. lse, limit: of those rows, in
// shared memory. kMasked: some row may not see some key; a hidden weight is left out, whatever its score.
template <bool kMasked, int kValues>
__device__ __forceinline__ void add_column_sums(float (&sum)[2], const float (&s)[kValues], const float* lse,
                                                const std::int32_t* limit, int first_key, float scale_log2) {
  const int column = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kValues / 4; ++j) {
    const float2 base = *reinterpret_cast<const float2*>(lse + 8 * j + column);
    int2 last = make_int2(0, 0);
    if constexpr (kMasked) {
      last = *reinterpret_cast<const int2*>(limit + 8 * j + column);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float a = ptx::exp2(fmaf(s[4 * j + 2 * i], scale_log2, -base.x));
      float b = ptx::exp2(fmaf(s[4 * j + 2 * i + 1], scale_log2, -base.y));
      if constexpr (kMasked) {
        a = first_key + 8 * i <= last.x ? a : 0.0F;
        b = first_key + 8 * i <= last.y ? b : 0.0F;
      }
      sum[i] += a + b;
    }
  }
}

}  // namespace zipvl::cuda::probe_scores
