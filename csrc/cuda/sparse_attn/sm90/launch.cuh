// The Hopper kernel's launch for one element type and head dim (instantiate.cu.in).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <tuple>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sparse_attn/sm90/kernel.cuh"
#include "cuda/sparse_attn/sm90/params.h"

namespace zipvl::cuda::sparse_attn::sm90 {

// A tensor map of `box_rows` rows of a list of keys or values at once: the packed rows, or the tokens as they lie.
inline cudaError_t map_of(const SparseAttnParams& problem, const void* packed, const void* data,
                          const std::int64_t (&stride)[3], std::uint32_t box_rows, CUtensorMap* map) {
  const auto head_dim = static_cast<std::uint64_t>(problem.head_dim);
  const auto kv_heads = static_cast<std::uint64_t>(problem.kv_heads);
  const auto batch = static_cast<std::uint64_t>(problem.batch);
  const std::int64_t head = problem.capacity * problem.head_dim;
  if (packed == nullptr) {
    return make_tensor_map({data,
                            problem.element,
                            {head_dim, static_cast<std::uint64_t>(problem.tokens), kv_heads, batch},
                            {stride[2], stride[1], stride[0]},
                            {kSlabColumns, box_rows, 1, 1}},
                           map);
  }
  return make_tensor_map({packed,
                          problem.element,
                          {head_dim, static_cast<std::uint64_t>(problem.capacity), kv_heads, batch},
                          {problem.head_dim, head, head * problem.kv_heads},
                          {kSlabColumns, box_rows, 1, 1}},
                         map);
}

template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& problem, const std::int32_t* seen, int num_sms, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim, Seen::kSelection>;
  const AttnParams params = attn_params(problem, seen);
  CUtensorMap k_map, v_map;
  if (const cudaError_t error = map_of(problem, problem.k_packed, problem.k, problem.k_stride, Tr::kBlockN, &k_map);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = map_of(problem, problem.v_packed, problem.v, problem.v_stride, Tr::kBlockN, &v_map);
      error != cudaSuccess) {
    return error;
  }
  constexpr int kSharedBytes = sizeof(SharedStorage<Tr>) + 1024;  // dynamic shared memory is aligned to 16 bytes only
  auto* kernel = &sparse_attn_sm90<Tr>;
  const std::int64_t tiles =
      static_cast<std::int64_t>(params.batch) * params.query_heads * ceil_div(params.tokens, Tr::kBlockM);
  return launch_dependent(kernel, static_cast<unsigned>(std::min<std::int64_t>(tiles, num_sms)), Tr::kThreads,
                          kSharedBytes, stream, params, k_map, v_map);
}

template <typename Tr>
cudaError_t launch_ranged(const SparseAttnParams& problem, int num_sms, cudaStream_t stream) {
  const AttnParams params = attn_params(problem, nullptr);
  RangedMaps maps;
  for (const auto& [packed, data, stride, rows, map] :
       {std::tuple{problem.k_packed, problem.k, &problem.k_stride, Tr::kBlockN, &maps.k},
        std::tuple{problem.v_packed, problem.v, &problem.v_stride, Tr::kBlockN, &maps.v},
        std::tuple{problem.k_packed, problem.k, &problem.k_stride, Tr::kSinkRows, &maps.sink_k},
        std::tuple{problem.v_packed, problem.v, &problem.v_stride, Tr::kSinkRows, &maps.sink_v}}) {
    if (const cudaError_t error = map_of(problem, packed, data, *stride, static_cast<std::uint32_t>(rows), map);
        error != cudaSuccess) {
      return error;
    }
  }
  constexpr int kSharedBytes = sizeof(SharedStorage<Tr>) + 1024;
  const std::int64_t tiles =
      static_cast<std::int64_t>(params.batch) * params.query_heads * ceil_div(params.tokens, Tr::kBlockM);
  const std::int64_t blocks = std::min<std::int64_t>(tiles, num_sms * Tr::kBlocksPerSm);
  return launch_dependent(&ranged_attn_sm90<Tr>, static_cast<unsigned>(blocks), Tr::kThreads, kSharedBytes, stream,
                          params, maps);
}

template <typename ElementType, int HeadDim>
cudaError_t launch_ranged_kernel(const SparseAttnParams& problem, int num_sms, cudaStream_t stream) {
  if constexpr (Traits<ElementType, HeadDim, Seen::kWindow>::kWindow) {
    if (problem.ranges.in_window) {
      return launch_ranged<Traits<ElementType, HeadDim, Seen::kWindow>>(problem, num_sms, stream);
    }
  }
  return launch_ranged<Traits<ElementType, HeadDim, Seen::kRanged>>(problem, num_sms, stream);
}

}  // namespace zipvl::cuda::sparse_attn::sm90
