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
#include "cuda/sparse_attn/sm90/window.cuh"

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

// Blocks of a grid: one a multiprocessor, which takes tile after tile.
template <typename Tr>
unsigned grid_of(const AttnParams& params, int num_sms) {
  const std::int64_t tiles =
      static_cast<std::int64_t>(params.batch) * params.query_heads * ceil_div(params.tokens, Tr::kBlockM);
  return static_cast<unsigned>(std::min<std::int64_t>(tiles, num_sms));
}

template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& problem, const std::int32_t* seen, int num_sms, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim, /*Ranged=*/false>;
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
  return launch_dependent(kernel, grid_of<Tr>(params, num_sms), Tr::kThreads, kSharedBytes, stream, params, k_map,
                          v_map);
}

// Blocks of kBlockN keys and values at once, and kSinkRows of them.
template <typename Tr>
cudaError_t ranged_maps(const SparseAttnParams& problem, RangedMaps* maps) {
  for (const auto& [packed, data, stride, rows, map] :
       {std::tuple{problem.k_packed, problem.k, &problem.k_stride, Tr::kBlockN, &maps->k},
        std::tuple{problem.v_packed, problem.v, &problem.v_stride, Tr::kBlockN, &maps->v},
        std::tuple{problem.k_packed, problem.k, &problem.k_stride, kSinkRows, &maps->sink_k},
        std::tuple{problem.v_packed, problem.v, &problem.v_stride, kSinkRows, &maps->sink_v}}) {
    if (const cudaError_t error = map_of(problem, packed, data, *stride, static_cast<std::uint32_t>(rows), map);
        error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

template <typename ElementType, int HeadDim>
cudaError_t launch_ranged(const SparseAttnParams& problem, int num_sms, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim, /*Ranged=*/true>;
  RangedMaps maps;
  if (const cudaError_t error = ranged_maps<Tr>(problem, &maps); error != cudaSuccess) {
    return error;
  }
  const AttnParams params = attn_params(problem, nullptr);
  constexpr int kSharedBytes = sizeof(SharedStorage<Tr>) + 1024;
  return launch_dependent(&ranged_attn_sm90<Tr>, grid_of<Tr>(params, num_sms), Tr::kThreads, kSharedBytes, stream,
                          params, maps);
}

// Whether the copy engine reads the queries, which takes no strides of 0.
inline bool copies_queries(const SparseAttnParams& problem) {
  const auto& stride = problem.q_stride;
  return (problem.batch == 1 || stride[0] > 0) && (problem.query_heads == 1 || stride[1] > 0) &&
         (problem.queries == 1 || stride[2] > 0);
}

template <typename ElementType, int HeadDim>
cudaError_t launch_window(const SparseAttnParams& problem, int num_sms, cudaStream_t stream) {
  using Tr = WindowTraits<ElementType, HeadDim>;
  WindowMaps maps;
  if (const cudaError_t error = ranged_maps<Tr>(problem, &maps.keys); error != cudaSuccess) {
    return error;
  }
  const AttnParams params = attn_params(problem, nullptr);
  const int tokens = tokens_of_tile<Tr>(params.group);
  const std::int64_t out_row = problem.query_heads * problem.head_dim;
  const auto size = [](std::int64_t x) { return static_cast<std::uint64_t>(x); };
  TensorMapView rows{problem.q,
                     problem.element,
                     {size(problem.head_dim), size(problem.query_heads), size(problem.queries), size(problem.batch)},
                     {problem.q_stride[1], problem.q_stride[2], problem.q_stride[0]},
                     {kSlabColumns, static_cast<std::uint32_t>(params.group), static_cast<std::uint32_t>(tokens), 1}};
  if (const cudaError_t error = make_tensor_map(rows, &maps.q); error != cudaSuccess) {
    return error;
  }
  rows.data = problem.out;
  const std::int64_t out_stride[3] = {problem.head_dim, out_row, problem.queries * out_row};
  std::copy_n(out_stride, 3, rows.stride);
  if (const cudaError_t error = make_tensor_map(rows, &maps.out); error != cudaSuccess) {
    return error;
  }
  const std::int64_t tiles = std::int64_t{params.batch} * params.kv_heads * ceil_div(params.tokens, tokens);
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>(tiles, num_sms));
  constexpr int kSharedBytes = sizeof(WindowStorage<Tr>) + 1024;
  return launch_dependent(&window_attn_sm90<Tr>, grid, Tr::kThreads, kSharedBytes, stream, params, maps);
}

template <typename ElementType, int HeadDim>
cudaError_t launch_ranged_kernel(const SparseAttnParams& problem, int num_sms, cudaStream_t stream) {
  if constexpr (HeadDim != 256) {  // whose outputs leave no room for three consumers
    const bool fits = problem.query_heads / problem.kv_heads <= WindowTraits<ElementType, HeadDim>::kBlockM &&
                      problem.ranges.num_sinks <= kSinkRows;
    if (problem.ranges.in_window && fits && copies_queries(problem)) {
      return launch_window<ElementType, HeadDim>(problem, num_sms, stream);
    }
  }
  return launch_ranged<ElementType, HeadDim>(problem, num_sms, stream);
}

}  // namespace zipvl::cuda::sparse_attn::sm90
