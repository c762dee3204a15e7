// The Hopper kernel's launch for one element type and head dim (instantiate.cu.in).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sparse_attn/sm90/kernel.cuh"
#include "cuda/sparse_attn/sm90/params.h"

namespace zipvl::cuda::sparse_attn::sm90 {

template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& problem, const std::int32_t* seen, int num_sms, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  const AttnParams params = attn_params(problem, seen);
  const auto map_of = [&](const void* data, CUtensorMap* map) {
    const std::int64_t head = problem.capacity * HeadDim;
    return make_tensor_map({data,
                            problem.element,
                            {HeadDim, static_cast<std::uint64_t>(problem.capacity),
                             static_cast<std::uint64_t>(problem.kv_heads), static_cast<std::uint64_t>(problem.batch)},
                            {HeadDim, head, head * problem.kv_heads},
                            {kSlabColumns, Tr::kBlockN, 1, 1}},
                           map);
  };
  CUtensorMap k_map, v_map;
  if (const cudaError_t error = map_of(problem.k_packed, &k_map); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = map_of(problem.v_packed, &v_map); error != cudaSuccess) {
    return error;
  }
  constexpr int kSharedBytes = sizeof(SharedStorage<Tr>) + 1024;  // dynamic shared memory is aligned to 16 bytes only
  auto* kernel = &sparse_attn_sm90<Tr>;
  const std::int64_t tiles =
      static_cast<std::int64_t>(params.batch) * params.query_heads * ceil_div(params.tokens, Tr::kBlockM);
  return launch_dependent(kernel, static_cast<unsigned>(std::min<std::int64_t>(tiles, num_sms)), Tr::kThreads,
                          kSharedBytes, stream, params, k_map, v_map);
}

}  // namespace zipvl::cuda::sparse_attn::sm90
