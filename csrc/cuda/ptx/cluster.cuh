// Thread-block clusters (sm_90): who is who, and stores into another block's shared memory that complete on its
// mbarrier.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace zipvl::cuda::ptx {

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ std::uint32_t cluster_size() {
  std::uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The cluster's barrier in halves; every thread of every block calls both.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// The address of the same shared object in block `rank` of the cluster.
__device__ __forceinline__ std::uint32_t shared_address_in(const void* pointer, std::uint32_t rank) {
  std::uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// 4 bytes, or 16, into the shared memory of a block of the cluster; they complete on that block's `barrier`. Addresses
// from shared_address_in.
__device__ __forceinline__ void store_async(std::uint32_t target, std::uint32_t value, std::uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target), "r"(value),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(std::uint32_t target, const uint4& value, std::uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

// `bytes` (a multiple of 16) of this block's shared memory into that of a block of the cluster, both aligned to 16
// bytes; they complete on that block's `barrier`. Ordinary stores into `source` come before by
// fence_proxy_async_shared.
__device__ __forceinline__ void bulk_copy_to_block(std::uint32_t target, const void* source, std::uint32_t bytes,
                                                   std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "r"(shared_address(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace zipvl::cuda::ptx
