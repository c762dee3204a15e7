// Reading a ChosenRows: how many rows a batch row has, and where they begin among the packed ones.
#pragma once

#include "cuda/projections/projections.h"

namespace zipvl::cuda {

constexpr unsigned kWholeWarp = 0xFFFFFFFFU;

__device__ __forceinline__ std::int64_t rows_in(const ChosenRows& chosen, std::int64_t b) {
  if (chosen.count == nullptr) {
    return chosen.places;
  }
  const std::int64_t given = chosen.count[b * chosen.count_stride];
  return min(max(given, std::int64_t{0}), chosen.places);
}

// The rows of the batch rows before b. Every lane of the warp calls it.
__device__ __forceinline__ std::int64_t rows_before(const ChosenRows& chosen, std::int64_t b) {
  std::int64_t sum = 0;
  for (std::int64_t i = threadIdx.x % 32; i < b; i += 32) {
    sum += rows_in(chosen, i);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, offset);
  }
  return sum;
}

// The token of place `row`, or -1 where the entry names none.
__device__ __forceinline__ std::int64_t token_of(const ChosenRows& chosen, std::int64_t b, std::int64_t row) {
  const std::int64_t token = chosen.index[b * chosen.index_stride[0] + row * chosen.index_stride[1]];
  return token >= 0 && token < chosen.tokens ? token : -1;
}

}  // namespace zipvl::cuda
