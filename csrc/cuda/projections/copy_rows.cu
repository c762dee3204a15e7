// Chosen rows moved to the front, or back to where they belong: bytes only, a warp a row.
#include "cuda/projections/chosen_rows.cuh"

namespace zipvl::cuda {
namespace {

using namespace projections;

constexpr int kVectorsInFlight = 4;  // of 16 bytes, a lane: 128 KB in flight on a multiprocessor of 2,048 threads

enum class Direction { kGather, kScatter };

// to = from, `vectors` of them, by the lanes of a warp; null `from`: zeros.
__device__ void copy_row(uint4* to, const uint4* from, std::int64_t vectors) {
  const int lane = threadIdx.x % kWarpThreads;
  for (std::int64_t first = lane; first < vectors; first += kWarpThreads * kVectorsInFlight) {
    uint4 vector[kVectorsInFlight];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const std::int64_t at = first + kWarpThreads * i;
      vector[i] = from != nullptr && at < vectors ? from[at] : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const std::int64_t at = first + kWarpThreads * i;
      if (at < vectors) {
        to[at] = vector[i];
      }
    }
  }
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const __grid_constant__ CopyRowsParams params) {
  const ChosenRows& chosen = params.chosen;
  const int warp = threadIdx.x / kWarpThreads;
  if (params.total != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && warp == 0) {
    const std::int64_t rest = rows_before(chosen, chosen.batch) - chosen.first;
    if (threadIdx.x == 0) {
      *params.total = static_cast<std::int32_t>(min(max(rest, std::int64_t{0}), chosen.chunk));
    }
  }
  for (std::int64_t b = blockIdx.y; b < chosen.batch; b += gridDim.y) {
    auto* full = static_cast<uint4*>(params.full) + b * params.full_stride[0];
    const PlacesInChunk places = places_in_chunk(chosen, b);
    for (std::int64_t place = places.begin + std::int64_t{blockIdx.x} * kWarps + warp; place < places.end;
         place += std::int64_t{gridDim.x} * kWarps) {
      const std::int64_t token = token_of(chosen, b, place);
      uint4* here = static_cast<uint4*>(params.packed) + (places.shift + place) * params.row_vectors;
      uint4* there = token < 0 ? nullptr : full + token * params.full_stride[1];
      if constexpr (kDirection == Direction::kGather) {
        copy_row(here, there, params.row_vectors);
      } else if (there != nullptr) {
        copy_row(there, here, params.row_vectors);
      }
    }
  }
}

template <Direction kDirection>
cudaError_t launch(const CopyRowsParams& params, cudaStream_t stream) {
  copy_rows_kernel<kDirection><<<grid_of(params.chosen, 1, params.num_sms), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gather_rows(const CopyRowsParams& params, cudaStream_t stream) {
  return launch<Direction::kGather>(params, stream);
}

cudaError_t launch_scatter_rows(const CopyRowsParams& params, cudaStream_t stream) {
  return launch<Direction::kScatter>(params, stream);
}

}  // namespace zipvl::cuda
