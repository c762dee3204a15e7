// Asynchronous copies from global to shared memory (cp.async, sm_80). Shared addresses are those of the shared window,
// global ones aligned to the bytes copied.
//
// All of it is asm: CuTe's copies prefetch 128 bytes into L2 (.L2::128B), its cp_async_wait<0> is cp.async.wait_all,
// which closes a group of its own. Both are other machine code.
#pragma once

#include <cstdint>

namespace zipvl::cuda::ptx {

// 16 bytes, past L1.
__device__ __forceinline__ void cp_async_16(std::uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// 16 bytes, zeros unless `valid`: then `source` is not read.
__device__ __forceinline__ void cp_async_16(std::uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_4(std::uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's groups are under way; other threads' copies need a barrier besides.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace zipvl::cuda::ptx
