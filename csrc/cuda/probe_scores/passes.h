// The order of the kernels, and the choice of the instance, for either family. The family's .cu files include it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/probe_scores/probe_scores.h"

namespace zipvl::cuda {

template <typename Passes, typename ElementType, int HeadDim>
cudaError_t launch_passes_of(const ProbeScoresParams& params, cudaStream_t stream) {
  if constexpr (Passes::template kClusters<HeadDim>) {
    if (params.cluster_blocks > 0) {
      const cudaError_t error = Passes::template both<ElementType, HeadDim>(params, stream);
      return error != cudaSuccess || params.accumulated == nullptr ? error : launch_finish_scores(params, stream);
    }
  }
  if (const cudaError_t error = launch_gather_rows(params, stream); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = Passes::template first<ElementType, HeadDim>(params, stream); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = launch_combine_rows(params, stream); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = Passes::template second<ElementType, HeadDim>(params, stream); error != cudaSuccess) {
    return error;
  }
  return launch_finish_scores(params, stream);
}

template <typename Passes, typename ElementType>
cudaError_t launch_passes_of_type(const ProbeScoresParams& params, cudaStream_t stream) {
  switch (params.head_dim) {
    case 64:
      return launch_passes_of<Passes, ElementType, 64>(params, stream);
    case 96:
      return launch_passes_of<Passes, ElementType, 96>(params, stream);
    case 128:
      return launch_passes_of<Passes, ElementType, 128>(params, stream);
    case 256:
      return launch_passes_of<Passes, ElementType, 256>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Passes>
cudaError_t launch_passes(const ProbeScoresParams& params, cudaStream_t stream) {
  return params.element == Element::kFloat16 ? launch_passes_of_type<Passes, __half>(params, stream)
                                             : launch_passes_of_type<Passes, __nv_bfloat16>(params, stream);
}

}  // namespace zipvl::cuda
