// Synchronisation beside mbarriers: named barriers, register redistribution between warpgroups, and dependent launches.
#pragma once

#include <cstdint>

namespace zipvl::cuda::ptx {

// Barrier `id` (1 to 15; 0 is __syncthreads) of the block: waits for `threads` threads, those that only arrive
// included.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers a thread of this warpgroup, sm_90a; every warp of it calls.
template <int Registers>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Programmatic dependent launch: waits until the kernels before this one in the stream are done and their writes seen;
// returns at once in a kernel launched without the attribute.
__device__ __forceinline__ void wait_on_dependent_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel of the stream start; its own wait still orders memory.
__device__ __forceinline__ void launch_dependent_grids() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#else
__device__ __forceinline__ void wait_on_dependent_grids() {}
__device__ __forceinline__ void launch_dependent_grids() {}
#endif

}  // namespace zipvl::cuda::ptx
