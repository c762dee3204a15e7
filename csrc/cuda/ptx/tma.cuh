// Bulk copies by the copy engine (TMA, sm_90): tensor tiles into shared memory, and plain bytes out of it.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace zipvl::cuda::ptx {

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A tile of a rank-4 tensor map at (x, y, z, w), innermost first; its bytes complete on `barrier`. `target`: aligned to
// 1024 bytes (the maps of common/tensor_map.h use the 128-byte swizzle).
__device__ __forceinline__ void tma_load_4d(void* target, const CUtensorMap* map, std::uint64_t* barrier, int x, int y,
                                            int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// `bytes` (a multiple of 16) from global to shared memory, both aligned to 16 bytes; they complete on `barrier`.
__device__ __forceinline__ void bulk_load(void* target, const void* source, std::uint32_t bytes,
                                          std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// `bytes` (a multiple of 16) from shared to global memory, both aligned to 16 bytes.
__device__ __forceinline__ void bulk_store(void* target, const void* source, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(shared_address(source)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `Pending` groups of this thread still read their source.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Shared memory written by ordinary stores before this is seen by wgmma and bulk copies after it.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace zipvl::cuda::ptx
