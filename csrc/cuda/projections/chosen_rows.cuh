// Reading a ChosenRows: which places of a batch row a chunk has, and where they stand among the packed rows. Kernels
// over them give a warp a task: the grid does not know the counts, so warps stride over the tasks there are.
#pragma once

#include <algorithm>

#include "common/math.h"
#include "cuda/common/warp.cuh"
#include "cuda/projections/projections.h"

namespace zipvl::cuda::projections {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kBlocksPerSm = 16;  // two waves of resident ones, so that the last tasks do not leave it idle

// The grid of kThreads-blocks, row_tasks tasks a chosen row. blockIdx: share of a batch row's tasks, batch row.
inline dim3 grid_of(const ChosenRows& chosen, std::int64_t row_tasks, int num_sms) {
  constexpr std::int64_t kMaxGridY = 65535;
  const std::int64_t batch = std::min(chosen.batch, kMaxGridY);
  const std::int64_t max_blocks = std::max<std::int64_t>(std::int64_t{num_sms} * kBlocksPerSm / batch, 1);
  const std::int64_t tasks = std::min(chosen.places, chosen.chunk) * row_tasks;
  const std::int64_t blocks = std::clamp<std::int64_t>(ceil_div<std::int64_t>(tasks, kWarps), 1, max_blocks);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(batch));
}

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
  for (std::int64_t i = threadIdx.x % kWarpThreads; i < b; i += kWarpThreads) {
    sum += rows_in(chosen, i);
  }
  return warp_sum(sum);
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

}  // namespace zipvl::cuda::projections
