// Online softmax over the score tiles of a warpgroup (Milakov and Gimelshein, arXiv 1805.02867), in registers. A thread
// holds parts of two rows, 8 apart; the four lanes of a quad share a row.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

struct RowState {
  float max[2], sum[2];  // of the scores so far (unscaled), and of this thread's weights relative to that maximum
};

// The thread's row i: -inf from column `seen` on, counted from the thread's first column.
template <int kScores>
__device__ __forceinline__ void apply_mask(float (&s)[kScores], int i, int seen) {
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (8 * j + c >= seen) {
        s[4 * j + 2 * i + c] = -INFINITY;
      }
    }
  }
}

// The same before column `first`, and from column `end` on.
template <int kScores>
__device__ __forceinline__ void apply_mask(float (&s)[kScores], int i, int first, int end) {
#pragma unroll
  for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (static_cast<unsigned>(8 * j + c - first) >= static_cast<unsigned>(end - first)) {
        s[4 * j + 2 * i + c] = -INFINITY;
      }
    }
  }
}

// The keys that the thread's two rows see: packed keys up to `limit`, or places [first, limit) of a list.
template <bool kRanged>
struct RowLimits {
  const int (&limit)[2];
};
template <>
struct RowLimits<true> {
  const int (&first)[2];
  const int (&limit)[2];
};

// Scores [64, kBlockN] of packed keys from `first_column` on -> weights exp2(scale_log2 * (score - max)), in place.
// rescale: what sums and outputs so far must be multiplied by, as the maximum moved.
template <bool kMasked, bool kRanged, int kScores>
__device__ __forceinline__ void online_softmax(float (&s)[kScores], RowState& rows, float (&rescale)[2],
                                               float scale_log2, const RowLimits<kRanged>& seen, int first_column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int own_column = first_column + 2 * static_cast<int>(threadIdx.x % 4);
    if constexpr (kMasked && kRanged) {
      apply_mask(s, i, seen.first[i] - own_column, seen.limit[i] - own_column);
    } else if constexpr (kMasked) {
      apply_mask(s, i, seen.limit[i] - first_column - 2 * static_cast<int>(threadIdx.x % 4));
    }
    float max = rows.max[i];
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
      max = fmaxf(max, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    }
    max = quad_max(max);
    const float base = max == -INFINITY ? 0.0F : max * scale_log2;  // nothing seen yet: every weight is 0
    rescale[i] = ptx::exp2(rows.max[i] * scale_log2 - base);
    rows.max[i] = max;
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
__device__ __forceinline__ void rescale_o(float (&o)[kOutputs], const float (&rescale)[2]) {
  if (__any_sync(kAllLanes, rescale[0] != 1.0F || rescale[1] != 1.0F)) {
#pragma unroll
    for (int j = 0; j < kOutputs / 4; ++j) {
      o[4 * j] *= rescale[0];
      o[4 * j + 1] *= rescale[0];
      o[4 * j + 2] *= rescale[1];
      o[4 * j + 3] *= rescale[1];
    }
  }
}

// Of the thread's row i: its sum over all columns, log2 of the sum of 2**score, and what a pass over other keys left in
// `out` weighs beside this one's.
struct Merge {
  float inverse, other;  // out = o * inverse + (what is there) * other
};

// lse: of the row and head, written or, with kMerges, read; null: there is none. Every lane of the quad that holds the
// row calls it.
template <bool kMerges>
__device__ __forceinline__ Merge merge_row(const RowState& rows, int i, float scale_log2, float* lse) {
  const float sum = quad_sum(rows.sum[i]);
  Merge merge{sum == 0.0F ? 0.0F : 1.0F / sum, 0.0F};  // a row that sees no key is 0; NaN stays
  if (lse == nullptr) {
    return merge;
  }
  const float own = sum == 0.0F ? -INFINITY : rows.max[i] * scale_log2 + log2f(sum);
  if constexpr (!kMerges) {
    if (threadIdx.x % 4 == 0) {
      *lse = own;
    }
    return merge;
  }
  const float before = __ldcg(lse);
  const float top = fmaxf(own, before);
  if (top == -INFINITY) {
    return merge;  // neither sees anything
  }
  const float mine = exp2f(own - top), theirs = exp2f(before - top), both = 1.0F / (mine + theirs);
  merge.inverse *= mine * both;
  merge.other = theirs * both;
  return merge;
}

}  // namespace zipvl::cuda::sparse_attn::sm90
