// Copies by the copy engine (TMA, sm_90): tensor tiles into shared memory, plain bytes in, out and between the blocks
// of a cluster; and stores into another block's shared memory that complete on its mbarrier.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/ptx/barrier.cuh"

namespace zipvl::cuda::ptx {

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) { cute::prefetch_tma_descriptor(map); }

// A tile of a rank-4 tensor map at (x, y, z, w), innermost first; its bytes complete on `barrier`. `target`: aligned to
// 1024 bytes (the maps of common/tensor_map.h use the 128-byte swizzle). asm: CuTe's takes a cache hint, an operand
// more.
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
  cute::SM90_BULK_COPY_G2S::copy(source, barrier, target, static_cast<int>(bytes));
}

// `bytes` (a multiple of 16) from shared to global memory, both aligned to 16 bytes.
__device__ __forceinline__ void bulk_store(void* target, const void* source, std::uint32_t bytes) {
  cute::SM90_BULK_COPY_S2G::copy(source, target, static_cast<int>(bytes));
}

// A tile from shared memory to where a rank-4 tensor map says; rows and columns outside the view stay. `source`: as the
// target of tma_load_4d.
__device__ __forceinline__ void tma_store_4d(const CUtensorMap* map, const void* source, int x, int y, int z, int w) {
  ordered([=] { cute::SM90_TMA_STORE_4D::copy(map, source, x, y, z, w); });
}

__device__ __forceinline__ void tma_store_arrive() {
  ordered([] { cute::tma_store_arrive(); });
}

// Waits until at most `Pending` groups of this thread still read their source.
template <int Pending>
__device__ __forceinline__ void tma_store_wait() {
  cute::tma_store_wait<Pending>();
}

// Shared memory written by ordinary stores before this is seen by wgmma and bulk copies after it.
__device__ __forceinline__ void fence_view_async_shared() {
  ordered([] { cutlass::arch::fence_view_async_shared(); });
}

// ---- to another block of the cluster: addresses from shared_address_in

// 4 bytes, or 16, that complete on that block's `barrier`. asm: CuTe's store_shared_remote maps both addresses at each
// call, and has no 16 bytes.
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
// fence_view_async_shared. asm: CuTe lacks it.
__device__ __forceinline__ void bulk_copy_to_block(std::uint32_t target, const void* source, std::uint32_t bytes,
                                                   std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "r"(shared_address(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace zipvl::cuda::ptx
