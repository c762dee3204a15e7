// The kernels of probe_scores in their order, for one element type and head dim of either family. ElementType: __half
// or __nv_bfloat16. The simulator takes its instances from here, and launch.cu those of the library.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/probe_scores/params.h"
#include "cuda/probe_scores/plan.h"

namespace zipvl::cuda::probe_scores {

// The kernels around the two passes, which both families share (rows.cu).
cudaError_t launch_gather_rows(const ProbeScoresParams& params, cudaStream_t stream);
cudaError_t launch_combine_rows(const ProbeScoresParams& params, cudaStream_t stream);
cudaError_t launch_finish_scores(const ProbeScoresParams& params, cudaStream_t stream);

namespace sm80 {

// The two passes; defined in passes.cuh.
template <typename ElementType, int HeadDim>
struct Passes {
  static constexpr bool kClusters = false;  // has `both`
  static cudaError_t row_statistics(const ProbeScoresParams& params, cudaStream_t stream);
  static cudaError_t column_sums(const ProbeScoresParams& params, cudaStream_t stream);
};

}  // namespace sm80

namespace sm90 {

// The two passes, and both in one kernel of clusters where params.cluster_blocks > 0; defined in launch.cuh.
template <typename ElementType, int HeadDim>
struct Passes {
  static constexpr bool kClusters = plan::probe_cluster_keys(HeadDim) > 0;
  static cudaError_t row_statistics(const ProbeScoresParams& params, cudaStream_t stream);
  static cudaError_t column_sums(const ProbeScoresParams& params, cudaStream_t stream);
  static cudaError_t both(const ProbeScoresParams& params, cudaStream_t stream);
};

}  // namespace sm90

template <typename Passes>
cudaError_t launch_passes(const ProbeScoresParams& params, cudaStream_t stream) {
  if constexpr (Passes::kClusters) {
    if (params.cluster_blocks > 0) {
      const cudaError_t error = Passes::both(params, stream);
      return error != cudaSuccess || params.accumulated == nullptr ? error : launch_finish_scores(params, stream);
    }
  }
  if (const cudaError_t error = launch_gather_rows(params, stream); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = Passes::row_statistics(params, stream); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = launch_combine_rows(params, stream); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = Passes::column_sums(params, stream); error != cudaSuccess) {
    return error;
  }
  return launch_finish_scores(params, stream);
}

}  // namespace zipvl::cuda::probe_scores
