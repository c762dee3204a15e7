// Sinks of ranged attention: the first places of a list of keys, which rows see besides their range. They are a tile of
// keys in small, before the others, in shared memory of its own.
#pragma once

#include <cstdint>

#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sparse_attn/sm90/params.h"
#include "cuda/sparse_attn/sm90/softmax.cuh"
#include "cuda/sparse_attn/sm90/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

// One thread: all sinks of a head, kSinkRows at a time.
template <typename Traits>
__device__ __forceinline__ void load_sinks(const AttnParams& params, const RangedMaps& maps, SinkStorage<Traits>& sinks,
                                           int kv_head, int batch, std::uint32_t& phase) {
  using Sinks = typename SinkStorage<Traits>::Layout;
  for (int sink = 0; sink < params.ranges.num_sinks; sink += kSinkRows) {
    ptx::mbarrier_wait(&sinks.empty, phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(&sinks.full, 2 * Sinks::kBytes);
#pragma unroll 1
    for (int slab = 0; slab < Sinks::kSlabs; ++slab) {
      const int column = slab * kSlabColumns;
      ptx::tma_load_4d(sinks.k + slab * Sinks::kSlabElements, &maps.sink_k, &sinks.full, column, sink, kv_head, batch);
      ptx::tma_load_4d(sinks.v + slab * Sinks::kSlabElements, &maps.sink_v, &sinks.full, column, sink, kv_head, batch);
    }
    phase ^= 1;
  }
}

// The sinks from `sink` on, as many as one product takes; row i of the thread sees the places below seen[i].
// multiply(s, key, k): step k of the scores' product with the keys of that descriptor.
template <typename Traits, typename Multiply>
__device__ __forceinline__ void attend_sinks(float (&o)[Traits::kHeadDim / 2], RowState& rows,
                                             SinkStorage<Traits>& sinks, std::uint32_t& phase, float scale_log2,
                                             const int (&seen)[2], int sink, const Multiply& multiply) {
  using Sinks = typename SinkStorage<Traits>::Layout;
  using Element = typename Traits::Element;
  float s[kSinkRows / 2], rescale[2];
  ptx::mbarrier_wait(&sinks.full, phase);
  phase ^= 1;
  const std::uint64_t key = ptx::wgmma_descriptor(sinks.k);
  ptx::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
    multiply(s, ptx::wgmma_advance(key, Sinks::column_step(k)), k);
  }
  ptx::warpgroup_commit_batch();
  ptx::warpgroup_wait<0>();
  ptx::warpgroup_fence_operand(s);
  const int none[2] = {0, 0};
  online_softmax<true>(s, rows, rescale, scale_log2, RowLimits<true>{none, seen}, sink);
  rescale_o(o, rescale);
  std::uint32_t p[1][4];
  to_fragments<Element>(s, p);
  const std::uint64_t value = ptx::wgmma_descriptor(sinks.v, Sinks::kGroupBytes, Sinks::kSlabBytes);
  ptx::warpgroup_fence_operand(o);
  ptx::warpgroup_arrive();
  ptx::Wgmma<Element, Traits::kHeadDim, true>::rs(o, p[0], value, 1);
  ptx::warpgroup_commit_batch();
  ptx::warpgroup_wait<0>();
  ptx::warpgroup_fence_operand(o);
  if (threadIdx.x % kWarpThreads == 0) {
    ptx::mbarrier_arrive(&sinks.empty);
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm90
