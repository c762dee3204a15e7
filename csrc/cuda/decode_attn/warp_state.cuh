// One warp's attention of up to eight query heads to tokens of one key/value head. Tokens are the rows of the scores
// and heads their columns (S = K Q^T), so that no row of a matrix product is wasted on heads that are not there;
// outputs are kept transposed too (channels by heads). Lane (i, j) = (lane / 4, lane % 4) has heads 2 j and 2 j + 1.
#pragma once

#include <cstdint>

#include "cuda/common/quad.cuh"
#include "cuda/ptx/exp2.cuh"
#include "cuda/ptx/mma.cuh"

namespace zipvl::cuda::decode {

constexpr float kNone = -INFINITY;

// Over the eight lanes that hold the same two heads.
__device__ __forceinline__ float column_max(float x) {
  for (int offset = 4; offset < 32; offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, offset));
  }
  return x;
}
__device__ __forceinline__ float column_sum(float x) {
  for (int offset = 4; offset < 32; offset *= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFU, x, offset);
  }
  return x;
}

template <int D>
struct WarpState {
  float most[2] = {kNone, kNone};  // of the scores so far, base 2
  float sum[2] = {0.0F, 0.0F};     // of this lane's tokens
  float offset[2] = {0.0F, 0.0F};  // weighted sum of what every channel of a token has in common, of this lane's tokens
  float out[D / 16][4] = {};       // channels 16 m + i (and + 8), heads 2 j and 2 j + 1

  // The outputs of channels 16 m + 8 + i times `factor`.
  __device__ __forceinline__ void scale_upper(float factor) {
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      out[m][2] *= factor;
      out[m][3] *= factor;
    }
  }

  // Scores `s [Tiles][4]` of Tiles x 16 tokens (base 2; -inf: masked) become weights, and what was summed so far is
  // brought to the new maximum.
  template <int Tiles>
  __device__ __forceinline__ void weigh(float (&s)[Tiles][4]) {
    float now[2] = {kNone, kNone};
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        now[c % 2] = fmaxf(now[c % 2], s[t][c]);
      }
    }
    float shift[2];
    bool same = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      now[h] = fmaxf(column_max(now[h]), most[h]);
      shift[h] = now[h] == kNone ? 0.0F : now[h];
      same = same && now[h] == most[h];
    }
    if (__any_sync(0xFFFFFFFFU, !same)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = ptx::exp2(most[h] - shift[h]);
        most[h] = now[h];
        sum[h] *= factor;
        offset[h] *= factor;
#pragma unroll
        for (int m = 0; m < D / 16; ++m) {
          out[m][h] *= factor;
          out[m][h + 2] *= factor;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[t][c] = ptx::exp2(s[t][c] - shift[c % 2]);
        sum[c % 2] += s[t][c];
      }
    }
  }
};

// Weights of 16 tokens as the B operand: tokens by heads.
template <typename Element>
__device__ __forceinline__ void weights_operand(std::uint32_t (&b)[2], const float (&p)[4]) {
  b[0] = ptx::transpose_8x8(pack_pair<Element>(p[0], p[1]));
  b[1] = ptx::transpose_8x8(pack_pair<Element>(p[2], p[3]));
}

// Queries of a chunk of heads as B operands, channels by heads; heads past `heads` are 0. q: the first head's row.
template <typename Element, int D>
__device__ __forceinline__ void load_queries(std::uint32_t (&b)[D / 16][2], const Element* q, std::int64_t head_stride,
                                             int heads) {
  const int lane = static_cast<int>(threadIdx.x % 32), i = lane / 4, j = lane % 4;
  const Element* row = q + i * head_stride;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      b[k][half] = i < heads ? *reinterpret_cast<const std::uint32_t*>(row + 16 * k + 8 * half + 2 * j) : 0;
    }
  }
}

}  // namespace zipvl::cuda::decode
