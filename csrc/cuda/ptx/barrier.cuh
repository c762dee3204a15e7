// Hopper's barriers: mbarriers, which count arrivals and bytes in shared memory; the barrier of a thread-block cluster
// and who is who in it; named barriers; and the registers that warpgroups hand each other.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>

#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::ptx {

// ---- mbarriers

// asm: CUTLASS's init names its operands in another order, and ptxas gives other registers to the rest of the kernel.
__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the asynchronous copies of this block.
__device__ __forceinline__ void fence_barrier_init() {
  ordered([] { cutlass::arch::fence_barrier_init(); });
}

__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  ordered([=] { cutlass::arch::ClusterBarrier::arrive(barrier); });
}

// One arrival, and `bytes` more to come from asynchronous copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(std::uint64_t* barrier, std::uint32_t bytes) {
  ordered([=] { cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes); });
}

// Arrives once this thread's cp.async copies so far are done; counts as one of the barrier's own arrivals.
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(std::uint64_t* barrier) {
  ordered([=] { cutlass::arch::cpasync_barrier_arrive_noinc(barrier); });
}

// Waits until the phase of this parity is complete. A fresh barrier is in phase 0: waiting for parity 1 returns at
// once. asm: CUTLASS's wait suspends for a time of its own, which is other machine code.
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Whether the phase of this parity is complete; does not wait.
__device__ __forceinline__ bool mbarrier_test_wait(std::uint64_t* barrier, std::uint32_t parity) {
  bool complete;
  ordered([&] { complete = cutlass::arch::ClusterBarrier::test_wait(barrier, parity, 1); });
  return complete;
}

// ---- clusters of thread blocks

__device__ __forceinline__ std::uint32_t cluster_rank() { return cute::block_rank_in_cluster(); }

// asm: CuTe knows a cluster's shape, not its size.
__device__ __forceinline__ std::uint32_t cluster_size() {
  std::uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The cluster's barrier in halves; every thread of every block calls both.
__device__ __forceinline__ void cluster_arrive() {
  ordered([] { cute::cluster_arrive(); });
}
__device__ __forceinline__ void cluster_wait() {
  ordered([] { cute::cluster_wait(); });
}

// The address of the same shared object in block `rank` of the cluster.
__device__ __forceinline__ std::uint32_t shared_address_in(const void* pointer, std::uint32_t rank) {
  return cute::set_block_rank(shared_address(pointer), rank);
}

// ---- named barriers and registers

// Barrier `id` (1 to 15; 0 is __syncthreads) of the block: waits for `threads` threads, those that only arrive
// included. CUTLASS adds 8 to an id, except to those that it calls reserved.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  ordered([=] { cutlass::arch::NamedBarrier::sync(threads, static_cast<cutlass::arch::ReservedNamedBarriers>(id)); });
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  ordered([=] { cutlass::arch::NamedBarrier::arrive(threads, static_cast<cutlass::arch::ReservedNamedBarriers>(id)); });
}

// Registers a thread of this warpgroup, sm_90a; every warp of it calls.
template <int Registers>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  cutlass::arch::warpgroup_reg_alloc<Registers>();
}

template <int Registers>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  cutlass::arch::warpgroup_reg_dealloc<Registers>();
}

}  // namespace zipvl::cuda::ptx
