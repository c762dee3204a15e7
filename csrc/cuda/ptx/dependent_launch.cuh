// Programmatic dependent launch (sm_90): a kernel starts before the one before it in the stream is done.
//
// asm: CUTLASS's grid_dependency_control.h is empty without a macro and on architectures whose number has no letter,
// where the launch asks for it all the same.
#pragma once

namespace zipvl::cuda::ptx {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Waits until the kernels before this one in the stream are done and their writes seen; returns at once in a kernel
// launched without the attribute.
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
