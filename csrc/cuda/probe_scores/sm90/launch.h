// The passes on Hopper. ElementType: __half or __nv_bfloat16.
#pragma once

#include "cuda/probe_scores/plan.h"
#include "cuda/probe_scores/probe_scores.h"

namespace zipvl::cuda::probe::sm90 {

template <typename ElementType, int HeadDim>
cudaError_t launch_first_pass(const ProbeScoresParams& params, cudaStream_t stream);

template <typename ElementType, int HeadDim>
cudaError_t launch_second_pass(const ProbeScoresParams& params, cudaStream_t stream);

// Both in one kernel; params.cluster_blocks > 0.
template <typename ElementType, int HeadDim>
cudaError_t launch_both_passes(const ProbeScoresParams& params, cudaStream_t stream);

// The family, for launch_passes of passes.h.
struct Passes {
  template <int HeadDim>
  static constexpr bool kClusters = plan::probe_cluster_keys(HeadDim) > 0;  // has `both`
  template <typename ElementType, int HeadDim>
  static cudaError_t first(const ProbeScoresParams& params, cudaStream_t stream) {
    return launch_first_pass<ElementType, HeadDim>(params, stream);
  }
  template <typename ElementType, int HeadDim>
  static cudaError_t second(const ProbeScoresParams& params, cudaStream_t stream) {
    return launch_second_pass<ElementType, HeadDim>(params, stream);
  }
  template <typename ElementType, int HeadDim>
  static cudaError_t both(const ProbeScoresParams& params, cudaStream_t stream) {
    return launch_both_passes<ElementType, HeadDim>(params, stream);
  }
};

}  // namespace zipvl::cuda::probe::sm90
