// One warp's attention of up to eight query heads to tokens of one key/value head. Tokens are the rows of the scores
// and heads their columns (S = K Q^T), so that no row of a matrix product is wasted on heads that are not there;
// outputs are kept transposed too (channels by heads). Lane (i, j) = (lane / 4, lane % 4) has heads 2 j and 2 j + 1.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/shape.h"
#include "cuda/ptx/cp_async.cuh"
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
  b[0] = ptx::movmatrix_trans(pack_pair<Element>(p[0], p[1]));
  b[1] = ptx::movmatrix_trans(pack_pair<Element>(p[2], p[3]));
}

// Queries of up to eight heads in a warp's shared memory, a row each.
template <typename Element, int D>
struct Queries {
  // 16 bytes more than the channels: the eight rows that ldmatrix reads at once fall on different banks.
  static constexpr int kRowBytes = decode_shape::query_bytes(D) / kDecodeHeads;

  // Starts copying rows q, q + head_stride, ...; those past `heads` become 0 and are not read.
  static __device__ __forceinline__ void fetch(std::uint32_t target, const Element* q, std::int64_t head_stride,
                                               int heads, int lane) {
    constexpr int kChunks = D / 8;  // of 16 bytes in a row
#pragma unroll
    for (int at = lane; at < kDecodeHeads * kChunks; at += 32) {
      const int head = at / kChunks, chunk = at % kChunks;
      const bool valid = head < heads;
      ptx::cp_async_16(target + head * kRowBytes + chunk * 16, q + (valid ? head : 0) * head_stride + chunk * 8, valid);
    }
  }

  // B operands, channels by heads, of channel tiles 2 pair (registers 0 and 1) and 2 pair + 1 (2 and 3).
  static __device__ __forceinline__ void load_tiles(std::uint32_t (&b)[4], std::uint32_t rows, int pair, int lane) {
    ptx::ldmatrix(b, rows + lane % 8 * kRowBytes + (4 * pair + lane / 8) * 16);
  }
  // The same by halves of a tile: channels 0 to 7 of both (registers 0 and 1), then 8 to 15 of both.
  static __device__ __forceinline__ void load_halves(std::uint32_t (&b)[4], std::uint32_t rows, int pair, int lane) {
    const int matrix = lane / 8;
    ptx::ldmatrix(b, rows + lane % 8 * kRowBytes + (4 * pair + matrix % 2 * 2 + matrix / 2) * 16);
  }
};

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
