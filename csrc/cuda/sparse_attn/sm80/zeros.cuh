// Zeros of tokens outside the selection: whole rows of all heads.
#pragma once

#include <cstdint>

#include "cuda/sparse_attn/sm80/scheduler.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::attn::sm80 {

// selected: kThreads bytes of shared memory. out: the batch row's, row_bytes a token.
template <typename Traits>
__device__ __forceinline__ void write_zeros(const Selection& selection, const Job& job, unsigned char* selected,
                                            char* out, std::int64_t row_bytes) {
  constexpr int kTokens = Traits::kThreads;  // whose membership is settled at once
  const int tokens = static_cast<int>(selection.tokens), thread = static_cast<int>(threadIdx.x);
  const int share = (tokens + job.of - 1) / job.of;
  const std::int64_t start = static_cast<std::int64_t>(job.number) * share;
  const int end = static_cast<int>(min(start + share, std::int64_t{tokens}));
  if (start >= end) {
    return;
  }
  int place = selection.seen_by(static_cast<int>(start) - 1);
  for (int begin = static_cast<int>(start); begin < end; begin += kTokens) {
    const int here = min(kTokens, end - begin);
    selected[thread] = 0;
    __syncthreads();
    bool inside = false;
    if (place + thread < selection.count) {
      const int token = static_cast<int>(selection.token(place + thread));
      inside = token < begin + here;
      if (inside && token >= begin) {
        selected[token - begin] = 1;
      }
    }
    place += __syncthreads_count(inside);
    for (int t = 0; t < here; ++t) {
      if (selected[t] == 0) {
        char* row = out + (begin + t) * row_bytes;
        for (std::int64_t byte = thread * kChunkBytes; byte < row_bytes; byte += kTokens * kChunkBytes) {
          *reinterpret_cast<uint4*>(row + byte) = make_uint4(0, 0, 0, 0);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace zipvl::cuda::attn::sm80
