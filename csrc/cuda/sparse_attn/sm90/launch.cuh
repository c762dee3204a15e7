// The body of launch_kernel (launch.h), for the files that instantiate it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <numbers>

#include "cuda/sparse_attn/sm90/kernel.cuh"
#include "cuda/sparse_attn/sm90/launch.h"

namespace zipvl::cuda::attn::sm90 {

inline AttnParams attn_params(const SparseAttnParams& from, const std::int32_t* seen) {
  AttnParams params{};
  params.q = from.q;
  params.out = from.out;
  params.index = from.index;
  params.count = from.count;
  params.count_stride = from.count_stride;
  params.seen = seen;
  std::copy_n(from.q_stride, 3, params.q_stride);
  std::copy_n(from.index_stride, 2, params.index_stride);
  params.batch = static_cast<int>(from.batch);
  params.query_heads = static_cast<int>(from.query_heads);
  params.kv_heads = static_cast<int>(from.kv_heads);
  params.group = params.query_heads / params.kv_heads;
  params.tokens = static_cast<int>(from.tokens);
  params.scale_log2 = from.scale * std::numbers::log2e_v<float>;
  params.causal = from.causal;
  params.all_queries = from.all_queries;
  return params;
}

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
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  const std::int64_t tiles =
      static_cast<std::int64_t>(params.batch) * params.query_heads * ((params.tokens + Tr::kBlockM - 1) / Tr::kBlockM);
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<std::int64_t>(tiles, num_sms)));
  config.blockDim = dim3(Tr::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params, k_map, v_map);
}

}  // namespace zipvl::cuda::attn::sm90
