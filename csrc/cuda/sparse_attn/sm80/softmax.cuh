// Online softmax over a warp's score tiles (Milakov and Gimelshein, arXiv 1805.02867), in registers. Of every 16-row
// tile a thread holds parts of two rows, 8 apart; the four lanes of a quad share a row.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::attn::sm80 {

// The rows of a thread: [16-row tile][row, row + 8].
template <int kRowTiles>
struct RowState {
  // Of the scores so far times scale_log2; what weights are relative to. Not -inf while nothing is seen, because that
  // less itself is NaN.
  float max[kRowTiles][2];
  float sum[kRowTiles][2];  // of this thread's weights

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max[m][i] = -1e38F;
        sum[m][i] = 0.0F;
      }
    }
  }
};

// Scores of packed keys from `first_column` on: -inf where the row does not see the key. limit: keys seen by the warp's
// rows.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void hide(float (&s)[kRowTiles][kColumnTiles][4], const int* limit, int first_column) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  const int column = first_column + 2 * (lane % 4);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int left = limit[m * 16 + i * 8 + lane / 4] - column;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c >= left) {
            s[m][j][2 * i + c] = -INFINITY;
          }
        }
      }
    }
  }
}

// The rows' maxima take in the scores, and output and sums so far follow them.
template <int kRowTiles, int kColumnTiles, int kOutputTiles>
__device__ __forceinline__ void move_maximum(const float (&s)[kRowTiles][kColumnTiles][4],
                                             float (&o)[kRowTiles][kOutputTiles][4], RowState<kRowTiles>& rows,
                                             float scale_log2) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = s[m][0][2 * i];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        most = fmaxf(most, fmaxf(s[m][j][2 * i], s[m][j][2 * i + 1]));
      }
      const float moved = fmaxf(rows.max[m][i], quad_max(most) * scale_log2);
      rescale[i] = ptx::exp2(rows.max[m][i] - moved);
      rows.max[m][i] = moved;
    }
    // The maximum seldom moves after the first tiles: a warp in which none did skips the multiplications.
    if (__any_sync(0xFFFFFFFFU, rescale[0] != 1.0F || rescale[1] != 1.0F)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows.sum[m][i] *= rescale[i];
#pragma unroll
        for (int j = 0; j < kOutputTiles; ++j) {
          o[m][j][2 * i] *= rescale[i];
          o[m][j][2 * i + 1] *= rescale[i];
        }
      }
    }
  }
}

// Weights exp2(scale_log2 * score - max) of columns 16 * n to 16 * n + 15, as the A operand of the second product; the
// sums take them in.
template <typename Element, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void weigh(std::uint32_t (&p)[kRowTiles][4], const float (&s)[kRowTiles][kColumnTiles][4],
                                      int n, RowState<kRowTiles>& rows, float scale_log2) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const float (&pair)[4] = s[m][2 * n + f / 2];
      const int i = f % 2;
      const float low = ptx::exp2(fmaf(pair[2 * i], scale_log2, -rows.max[m][i]));
      const float high = ptx::exp2(fmaf(pair[2 * i + 1], scale_log2, -rows.max[m][i]));
      rows.sum[m][i] += low + high;
      p[m][f] = pack_pair<Element>(low, high);
    }
  }
}

}  // namespace zipvl::cuda::attn::sm80
