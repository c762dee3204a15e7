// The passes on Hopper. ElementType: __half or __nv_bfloat16.
#pragma once

#include "cuda/probe_scores/probe_scores.h"

namespace zipvl::cuda::probe::sm90 {

template <typename ElementType, int HeadDim>
cudaError_t launch_first_pass(const ProbeScoresParams& params, cudaStream_t stream);

template <typename ElementType, int HeadDim>
cudaError_t launch_second_pass(const ProbeScoresParams& params, cudaStream_t stream);

// Both in one kernel; params.cluster_blocks > 0.
template <typename ElementType, int HeadDim>
cudaError_t launch_both_passes(const ProbeScoresParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda::probe::sm90
