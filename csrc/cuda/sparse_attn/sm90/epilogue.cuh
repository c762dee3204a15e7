// Output rows from accumulators to their tokens' places. A thread holds two adjacent columns of every eight; the four
// lanes of a quad exchange them so that each stores 16 bytes, and the quad 64 adjacent ones.
#pragma once

#include <cstdint>

#include "cuda/sparse_attn/sm90/softmax.cuh"

namespace zipvl::cuda::attn::sm90 {

// x[i] of lane j of a quad <-> x[j] of lane i.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&x)[4]) {
  const bool odd = threadIdx.x % 2 == 1, high = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const std::uint32_t got = __shfl_xor_sync(0xFFFFFFFFU, odd ? x[k] : x[k + 1], 1);
    x[k] = odd ? got : x[k];
    x[k + 1] = odd ? x[k + 1] : got;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::uint32_t got = __shfl_xor_sync(0xFFFFFFFFU, high ? x[k] : x[k + 2], 2);
    x[k] = high ? got : x[k];
    x[k + 2] = high ? x[k + 2] : got;
  }
}

// o [64, D] of a warpgroup divided by the rows' sums; target[i]: where the thread's row i begins, null: nowhere.
template <typename Element, int kOutputs>
__device__ __forceinline__ void store_rows(const float (&o)[kOutputs], const RowState& rows,
                                           Element* const (&target)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(rows.sum[i]);
    const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;  // a row that sees no key is 0; NaN stays
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) {
      std::uint32_t x[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int at = 4 * (4 * j + g) + 2 * i;
        x[g] = pack_pair<Element>(o[at] * inverse, o[at + 1] * inverse);
      }
      transpose_quad(x);
      if (target[i] != nullptr) {
        *reinterpret_cast<uint4*>(target[i] + 32 * j + 8 * (threadIdx.x % 4)) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

}  // namespace zipvl::cuda::attn::sm90
