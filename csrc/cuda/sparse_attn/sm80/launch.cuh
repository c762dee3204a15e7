// The portable kernel's launch for one element type and head dim (instantiate.cu.in).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm80/kernel.cuh"

namespace zipvl::cuda::sparse_attn::sm80 {

template <typename Traits>
cudaError_t launch(const SparseAttnParams& params, int num_sms, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Traits>);
  auto* kernel = &sparse_attn_sm80<Traits>;
  // At least one block of zeros for each head and batch row, unless every row is computed.
  const std::int64_t places = ceil_div(params.tokens, std::int64_t{Traits::kBlockM}) + (params.all_queries ? 0 : 1);
  const std::int64_t blocks_at_once = num_sms * Traits::kBlocksPerSm;
  const dim3 grid(static_cast<unsigned>(params.query_heads), static_cast<unsigned>(params.batch),
                  static_cast<unsigned>(places));
  return cuda::launch_kernel(kernel, {grid, Traits::kThreads, kSharedBytes}, stream, params,
                             static_cast<int>(blocks_at_once / (params.query_heads * params.batch)));
}

template <typename Traits>
cudaError_t launch_ranged(const SparseAttnParams& params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Traits>);
  const dim3 grid(static_cast<unsigned>(params.query_heads), static_cast<unsigned>(params.batch),
                  static_cast<unsigned>(ceil_div(params.queries, std::int64_t{Traits::kBlockM})));
  return cuda::launch_kernel(&ranged_attn_sm80<Traits>, {grid, Traits::kThreads, kSharedBytes}, stream, params);
}

// Two stages where a multiprocessor's shared memory then still holds as many blocks as its registers do. Not at D 128:
// measured on an H200 that was 5% slower.
template <typename ElementType, int HeadDim, bool Ranged>
cudaError_t launch_stages(const SparseAttnParams& params, cudaStream_t stream) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  const auto launch_with = [&]<int Stages>() {
    using Tr = Traits<ElementType, HeadDim, Stages, Ranged>;
    if constexpr (Ranged) {
      return launch_ranged<Tr>(params, stream);
    } else {
      return launch<Tr>(params, device_attribute<cudaDevAttrMultiProcessorCount>(device), stream);
    }
  };
  [[maybe_unused]] const int shared_bytes = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(device);
  if constexpr (HeadDim != 128) {
    using Two = Traits<ElementType, HeadDim, 2, Ranged>;
    constexpr int kReservedBytes = 1024;  // of every block, by the driver
    if (shared_bytes >= Two::kBlocksPerSm * static_cast<int>(sizeof(SharedStorage<Two>) + kReservedBytes)) {
      return launch_with.template operator()<2>();
    }
  }
  return launch_with.template operator()<1>();
}

template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& params, cudaStream_t stream) {
  return params.ranges.range != nullptr ? launch_stages<ElementType, HeadDim, true>(params, stream)
                                        : launch_stages<ElementType, HeadDim, false>(params, stream);
}

}  // namespace zipvl::cuda::sparse_attn::sm80
