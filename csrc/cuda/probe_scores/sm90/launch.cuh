// Launches of Hopper's kernels for one element type and head dim, with the tensor maps they read by.
#pragma once

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/probe_scores/passes.h"
#include "cuda/probe_scores/sm90/cluster_passes.cuh"
#include "cuda/probe_scores/sm90/passes.cuh"

namespace zipvl::cuda::probe_scores::sm90 {

constexpr int kSharedAlignment = 1024;   // of a kernel's; the launch aligns dynamic shared memory to 16 bytes only
constexpr int kMaxSharedBytes = 232448;  // of a block: 227 KiB

// Keys or gathered probe rows [batch, kv_heads, size, head_dim], `box_rows` rows of one slab at a time.
inline TensorMapView keys_view(const ProbeScoresParams& params, int box_rows) {
  return {params.k,
          params.element,
          {static_cast<std::uint64_t>(params.head_dim), static_cast<std::uint64_t>(params.tokens),
           static_cast<std::uint64_t>(params.kv_heads), static_cast<std::uint64_t>(params.batch)},
          {params.k_stride[2], params.k_stride[1], params.k_stride[0]},
          {kSlabColumns, static_cast<std::uint32_t>(box_rows), 1, 1}};
}

inline TensorMapView rows_view(const ProbeScoresParams& params, int box_rows) {
  const std::int64_t head = static_cast<std::int64_t>(params.rows) * params.head_dim;
  return {params.probe_rows,
          params.element,
          {static_cast<std::uint64_t>(params.head_dim), static_cast<std::uint64_t>(params.rows),
           static_cast<std::uint64_t>(params.kv_heads), static_cast<std::uint64_t>(params.batch)},
          {params.head_dim, head, head * params.kv_heads},
          {kSlabColumns, static_cast<std::uint32_t>(box_rows), 1, 1}};
}

template <typename Traits>
cudaError_t launch_pass(void (*kernel)(const ProbeScoresParams, const CUtensorMap, const CUtensorMap), int items,
                        const TensorMapView& held, const TensorMapView& stream_view, const ProbeScoresParams& params,
                        cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(SharedStorage<Traits>) + kSharedAlignment;
  CUtensorMap held_map, stream_map;
  if (const cudaError_t error = make_tensor_map(held, &held_map); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = make_tensor_map(stream_view, &stream_map); error != cudaSuccess) {
    return error;
  }
  return launch_dependent(kernel, static_cast<unsigned>(std::min(items, params.num_sms)), Traits::kThreads,
                          kSharedBytes, stream, params, held_map, stream_map);
}

template <typename ElementType, int HeadDim>
cudaError_t Passes<ElementType, HeadDim>::row_statistics(const ProbeScoresParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  static_assert(sizeof(SharedStorage<Tr>) + kSharedAlignment <= kMaxSharedBytes, "a block's shared memory");
  return launch_pass<Tr>(&probe_rows_sm90<Tr>, row_items<Tr>(params), rows_view(params, kUnitRows),
                         keys_view(params, Tr::kStreamRows), params, stream);
}

template <typename ElementType, int HeadDim>
cudaError_t Passes<ElementType, HeadDim>::column_sums(const ProbeScoresParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  return launch_pass<Tr>(&probe_columns_sm90<Tr>, key_items<Tr>(params), keys_view(params, kUnitRows),
                         rows_view(params, Tr::kStreamRows), params, stream);
}

template <typename ElementType, int HeadDim>
cudaError_t Passes<ElementType, HeadDim>::both(const ProbeScoresParams& params, cudaStream_t stream) {
  if constexpr (!kClusters) {
    return cudaErrorInvalidValue;
  } else {
    using Tr = ClusterTraits<ElementType, HeadDim>;
    constexpr int kSharedBytes = sizeof(ClusterShared<Tr>) + kSharedAlignment;
    static_assert(kSharedBytes <= kMaxSharedBytes, "a block's shared memory");
    CUtensorMap keys;
    if (const cudaError_t error = make_tensor_map(keys_view(params, Tr::kTileKeys), &keys); error != cudaSuccess) {
      return error;
    }
    const auto kernel = &probe_cluster_sm90<Tr>;
    const int blocks = params.batch * params.kv_heads * params.row_splits * params.cluster_blocks;
    return launch_dependent_clusters(kernel, static_cast<unsigned>(params.cluster_blocks),
                                     static_cast<unsigned>(blocks), Tr::kThreads, kSharedBytes, stream, params, keys);
  }
}

}  // namespace zipvl::cuda::probe_scores::sm90
