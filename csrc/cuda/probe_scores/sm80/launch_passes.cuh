// Launches of both passes for one element type and head dimension; instantiated in hdim*.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.h"
#include "cuda/probe_scores/sm80/first_pass.cuh"
#include "cuda/probe_scores/sm80/launch.h"
#include "cuda/probe_scores/sm80/second_pass.cuh"

namespace zipvl::cuda::probe::sm80 {

template <typename Traits>
cudaError_t launch_pass(void (*kernel)(const ProbeScoresParams), int blocks, const ProbeScoresParams& params,
                        cudaStream_t stream) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  return launch_dependent(kernel, static_cast<unsigned>(blocks), kThreads, Traits::kSharedBytes, stream, params);
}

template <typename ElementType, int HeadDim>
cudaError_t launch_first_pass(const ProbeScoresParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  const int blocks = params.batch * params.kv_heads * params.splits * (params.rows_padded / kBlockRows);
  return launch_pass<Tr>(&probe_rows_sm80<Tr>, blocks, params, stream);
}

template <typename ElementType, int HeadDim>
cudaError_t launch_second_pass(const ProbeScoresParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  const int blocks =
      params.batch * params.kv_heads * params.row_splits * ((params.tokens + kBlockRows - 1) / kBlockRows);
  return launch_pass<Tr>(&probe_columns_sm80<Tr>, blocks, params, stream);
}

}  // namespace zipvl::cuda::probe::sm80
