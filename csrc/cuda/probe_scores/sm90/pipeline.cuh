// The loads and products that the passes share.
#pragma once

#include <cuda.h>

#include "cuda/probe_scores/sm90/traits.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace zipvl::cuda::probe_scores::sm90 {

// Comes before the first load.
template <typename Traits>
__device__ __forceinline__ void begin(SharedStorage<Traits>& shared, const CUtensorMap* held,
                                      const CUtensorMap* stream) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupThreads / kWarpThreads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Traits::kConsumers; ++i) {
      ptx::mbarrier_init(&shared.held_full[i], 1);
    }
    ptx::fence_barrier_init();
    ptx::tma_prefetch(held);
    ptx::tma_prefetch(stream);
  }
  __syncthreads();
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
}

// One thread of the loading warp: a tile of kStreamRows rows from `first_row` of head (h, b) on, and `more_bytes` that
// the caller copies onto the same barrier.
template <typename Traits>
__device__ __forceinline__ void load_stream(SharedStorage<Traits>& shared, const PipelineState<Traits::kStages>& place,
                                            const CUtensorMap* map, int first_row, int h, int b,
                                            std::uint32_t more_bytes = 0) {
  using Stream = typename Traits::Stream;
  ptx::mbarrier_wait(&shared.empty[place.index], place.phase ^ 1);
  ptx::mbarrier_arrive_expect_tx(&shared.full[place.index], Stream::kBytes + more_bytes);
#pragma unroll
  for (int slab = 0; slab < Stream::kSlabs; ++slab) {
    ptx::tma_load_4d(shared.stream[place.index] + slab * Stream::kSlabElements, map, &shared.full[place.index],
                     slab * kSlabColumns, first_row, h, b);
  }
}

// s = 64 rows of a x rows of b^T, done on return. A, B: their tiles' layouts.
template <typename Traits, typename A, typename B, int kValues>
__device__ __forceinline__ void multiply(float (&s)[kValues], std::uint64_t a, std::uint64_t b) {
  using Product = ptx::Wgmma<typename Traits::Element, kValues * 2, false>;
  ptx::warpgroup_fence_operand(s);
  ptx::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
    Product::ss(s, ptx::wgmma_advance(a, A::column_step(k)), ptx::wgmma_advance(b, B::column_step(k)), k > 0);
  }
  ptx::warpgroup_commit_batch();
  ptx::warpgroup_wait<0>();
  ptx::warpgroup_fence_operand(s);
}

// A consumer warpgroup: its 64 held rows, and its place in the stream.
template <typename Traits>
struct Consumer {
  using Held = typename Traits::Held;
  static constexpr int kScores = Traits::kStreamRows / 2;  // a thread's of a tile

  SharedStorage<Traits>& shared;
  int warpgroup;
  std::uint32_t held_parity = 0;
  PipelineState<Traits::kStages> place;

  // Asks for the warpgroup's rows of an item. All its warps are done with the rows before; the barrier says so.
  __device__ __forceinline__ void load_held(const CUtensorMap* map, int first_row, int h, int b) {
    ptx::named_barrier_sync(1 + warpgroup, kWarpgroupThreads);
    if (threadIdx.x % kWarpgroupThreads == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.held_full[warpgroup], Held::kBytes);
#pragma unroll
      for (int slab = 0; slab < Held::kSlabs; ++slab) {
        ptx::tma_load_4d(shared.held[warpgroup] + slab * Held::kSlabElements, map, &shared.held_full[warpgroup],
                         slab * kSlabColumns, first_row, h, b);
      }
    }
  }

  // Waits for them.
  __device__ __forceinline__ void wait_held() {
    ptx::mbarrier_wait(&shared.held_full[warpgroup], held_parity);
    held_parity ^= 1;
  }

  __device__ __forceinline__ void wait_tile() { ptx::mbarrier_wait(&shared.full[place.index], place.phase); }

  // s = held rows x tile rows^T, done on return.
  __device__ __forceinline__ void multiply_tile(float (&s)[kScores]) const {
    multiply<Traits, Held, typename Traits::Stream>(s, ptx::wgmma_descriptor(shared.held[warpgroup]),
                                                    ptx::wgmma_descriptor(shared.stream[place.index]));
  }

  // This warp is done with the tile.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) {
      ptx::mbarrier_arrive(&shared.empty[place.index]);
    }
    place.advance();
  }
};

}  // namespace zipvl::cuda::probe_scores::sm90
