// Reading a ChosenRows: which places of a batch row a chunk has, and where they stand among the packed rows.
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

// The places [begin, end) of batch row b that are in the chunk; place p is packed row shift + p.
struct PlacesInChunk {
  std::int64_t begin, end, shift;
};

// Every lane of the warp calls it.
__device__ __forceinline__ PlacesInChunk places_in_chunk(const ChosenRows& chosen, std::int64_t b) {
  const std::int64_t rows = rows_in(chosen, b), shift = rows_before(chosen, b) - chosen.first;
  const auto within = [rows](std::int64_t place) { return min(max(place, std::int64_t{0}), rows); };
  return {within(-shift), within(chosen.chunk - shift), shift};
}

// The token of `place`, or -1 where the entry names none.
__device__ __forceinline__ std::int64_t token_of(const ChosenRows& chosen, std::int64_t b, std::int64_t place) {
  const std::int64_t token = chosen.index[b * chosen.index_stride[0] + place * chosen.index_stride[1]];
  return token >= 0 && token < chosen.tokens ? token : -1;
}

}  // namespace zipvl::cuda
