// The body of launch_kernel (launch.h), for the files that instantiate it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sparse_attn/sm80/kernel.cuh"
#include "cuda/sparse_attn/sm80/launch.h"

namespace zipvl::cuda::sm80 {

template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  constexpr int kSharedBytes = sizeof(SharedStorage<Tr>);
  auto* kernel = &sparse_attn_sm80<Tr>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  // At least one block of zeros for each head and batch row, unless every row is computed.
  const std::int64_t places = (params.tokens + Tr::kBlockM - 1) / Tr::kBlockM + (params.all_queries ? 0 : 1);
  const dim3 grid(static_cast<unsigned>(params.query_heads), static_cast<unsigned>(params.batch),
                  static_cast<unsigned>(places));
  kernel<<<grid, Tr::kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace zipvl::cuda::sm80
