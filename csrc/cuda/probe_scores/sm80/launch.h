// The two passes of the portable kernels. ElementType: __half or __nv_bfloat16.
#pragma once

#include "cuda/probe_scores/probe_scores.h"

namespace zipvl::cuda::probe::sm80 {

template <typename ElementType, int HeadDim>
cudaError_t launch_first_pass(const ProbeScoresParams& params, cudaStream_t stream);

template <typename ElementType, int HeadDim>
cudaError_t launch_second_pass(const ProbeScoresParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda::probe::sm80
