// One warp's attention of up to eight query heads to tokens of one key/value head. Tokens are the rows of the scores
// and heads their columns (S = K Q^T), so that no row of a matrix product is wasted on heads that are not there;
// outputs are kept transposed too (channels by heads). The warps of a block merge their states in the end. Lane (i, j)
// = (lane / 4, lane % 4) has heads 2 j and 2 j + 1.
#pragma once

#include <cstdint>

#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/shape.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode_attn {

constexpr float kMinusInfinity = -INFINITY;

// The base of exponents: the maximum, or 0 where nothing has been seen.
__device__ __forceinline__ float finite_shift(float max) { return max == kMinusInfinity ? 0.0F : max; }

__device__ __forceinline__ void add_weighted(float4& sum, float weight, float4 x) {
  sum.x += weight * x.x;
  sum.y += weight * x.y;
  sum.z += weight * x.z;
  sum.w += weight * x.w;
}
__device__ __forceinline__ float4 scaled(float4 x, float factor) {
  return {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

// Over the eight lanes that hold the same two heads.
__device__ __forceinline__ float column_max(float x) {
  for (int offset = 4; offset < kWarpThreads; offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
__device__ __forceinline__ float column_sum(float x) {
  for (int offset = 4; offset < kWarpThreads; offset *= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// The online softmax of a warp and its output so far. Base 2; sums are of this lane's tokens.
template <int D>
struct WarpState {
  float running_max[2] = {kMinusInfinity, kMinusInfinity};
  float running_sum[2] = {0.0F, 0.0F};
  float offset[2] = {0.0F, 0.0F};  // weighted sum of what all channels of a token have in common
  float out[D / 16][4] = {};       // channels 16 m + i (and + 8), heads 2 j and 2 j + 1

  // The outputs of channels 16 m + 8 + i times `factor`.
  __device__ __forceinline__ void scale_upper(float factor) {
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      out[m][2] *= factor;
      out[m][3] *= factor;
    }
  }

  // The outputs of head 2 j + h times `factor`.
  __device__ __forceinline__ void rescale_o(int h, float factor) {
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
      out[m][h] *= factor;
      out[m][h + 2] *= factor;
    }
  }

  // Scores `s [Tiles][4]` of Tiles x 16 tokens (-inf: masked) become weights; where the maximum grows, sums and outputs
  // are rescaled.
  template <int Tiles>
  __device__ __forceinline__ void online_softmax(float (&s)[Tiles][4]) {
    float new_max[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        new_max[c % 2] = fmaxf(new_max[c % 2], s[t][c]);
      }
    }
    float shift[2];
    bool same = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      new_max[h] = fmaxf(column_max(new_max[h]), running_max[h]);
      shift[h] = finite_shift(new_max[h]);
      same = same && new_max[h] == running_max[h];
    }
    if (__any_sync(kAllLanes, !same)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = ptx::exp2(running_max[h] - shift[h]);
        running_max[h] = new_max[h];
        running_sum[h] *= factor;
        offset[h] *= factor;
        rescale_o(h, factor);
      }
    }
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[t][c] = ptx::exp2(s[t][c] - shift[c % 2]);
        running_sum[c % 2] += s[t][c];
      }
    }
  }
};

// Scores of tokens at or past `tokens` become -inf.
template <int Tiles>
__device__ __forceinline__ void apply_mask(float (&s)[Tiles][4], int tokens, int lane) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s[t][c] = 16 * t + lane / 4 + c / 2 * 8 < tokens ? s[t][c] : kMinusInfinity;
    }
  }
}

// Weights of 16 tokens as the B operand: tokens by heads.
template <typename ElementType>
__device__ __forceinline__ void weights_operand(std::uint32_t (&b)[2], const float (&p)[4]) {
  b[0] = ptx::movmatrix_trans(pack_pair<ElementType>(p[0], p[1]));
  b[1] = ptx::movmatrix_trans(pack_pair<ElementType>(p[2], p[3]));
}

// Queries of up to eight heads in a warp's shared memory, a row each.
template <typename ElementType, int D>
struct Queries {
  using Rows = PaddedRows<D>;
  static_assert(kDecodeHeads * Rows::kRowBytes == query_bytes(D));

  // Starts copying rows q, q + head_stride, ...; those past `heads` become 0 and are not read.
  static __device__ __forceinline__ void fetch(std::uint32_t target, const ElementType* q, std::int64_t head_stride,
                                               int heads, int lane) {
#pragma unroll
    for (int at = lane; at < kDecodeHeads * Rows::kPieces; at += kWarpThreads) {
      const int head = at / Rows::kPieces, piece = at % Rows::kPieces;
      const bool valid = head < heads;
      ptx::cp_async_16(target + Rows::row(head) + Rows::in_row(piece),
                       q + (valid ? head : 0) * head_stride + piece * kPieceElements, valid);
    }
  }

  // B operands, channels by heads, of channel tiles 2 pair (registers 0 and 1) and 2 pair + 1 (2 and 3).
  static __device__ __forceinline__ void load_tiles(std::uint32_t (&b)[4], std::uint32_t rows, int pair, int lane) {
    ptx::ldmatrix(b, rows + Rows::row(lane % 8) + Rows::in_row(4 * pair + lane / 8));
  }
  // The same by halves of a tile: channels 0 to 7 of both (registers 0 and 1), then 8 to 15 of both.
  static __device__ __forceinline__ void load_halves(std::uint32_t (&b)[4], std::uint32_t rows, int pair, int lane) {
    const int matrix = lane / 8;
    ptx::ldmatrix(b, rows + Rows::row(lane % 8) + Rows::in_row(4 * pair + matrix % 2 * 2 + matrix / 2));
  }
};

// What a warp stores in its own shared memory to be merged, in floats: outputs [heads][D + 4] (4: rows of heads 2 j
// fall on different banks), then the heads' maxima and sums.
template <int D>
constexpr int kMergeRow = D + 4;
template <int D>
constexpr int kMergeBytes = kDecodeHeads * (kMergeRow<D> + 2) * static_cast<int>(sizeof(float));

// `own`: kMergeBytes of the calling warp's, which has nothing under way there. A barrier of the block must follow.
template <int D>
__device__ __forceinline__ void store_state(const WarpState<D>& state, float* own) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads), i = lane / 4, j = lane % 4;
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
    const float total = column_sum(state.running_sum[h]);
    if (i == 0) {
      sums[2 * j + h] = state.running_max[h];
      sums[2 * j + h + kDecodeHeads] = total;
    }
  }
}

// Merges the warps' states in a fixed order into partial result `partial` of `heads` heads. Every thread of the block
// calls; `first`: of the first warp's shared memory, `stride` floats before the next one's.
template <int D, int Warps>
__device__ __forceinline__ void merge_warps(const float* first, int stride, int heads, const DecodePartials& partials,
                                            std::int64_t partial) {
  constexpr int kLanes = D / 4;  // of a head, four channels each
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < heads * kLanes; at += Warps * kWarpThreads) {
    const int head = at / kLanes, lane = at % kLanes;
    const float* sums = first + kDecodeHeads * kMergeRow<D> + head;
    const float* row = first + head * kMergeRow<D> + 4 * lane;
    float weights[Warps], max = kMinusInfinity, total = 0.0F;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      weights[w] = sums[w * stride];
      max = fmaxf(max, weights[w]);
    }
    const float shift = finite_shift(max);
    float4 out{};
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      weights[w] = ptx::exp2(weights[w] - shift);
      total += weights[w] * sums[w * stride + kDecodeHeads];
      add_weighted(out, weights[w], *reinterpret_cast<const float4*>(row + w * stride));
    }
    const float factor = 1.0F / total;
    const std::int64_t row_out = partial * kDecodeHeads + head;
    reinterpret_cast<float4*>(partials.out)[row_out * kLanes + lane] = scaled(out, factor);
    if (lane == 0) {
      partials.lse[row_out] = max + log2f(total);
    }
  }
}

}  // namespace zipvl::cuda::decode_attn
