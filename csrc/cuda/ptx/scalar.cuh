// Shared addresses, 2**x, and asm that is no instruction: it tells the compiler what it may not know or move.
#pragma once

#include <cstdint>

namespace zipvl::cuda::ptx {

// The address in the shared window, which the instructions of this folder take.
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// 2**x on the special function unit. Relative error at most 2**-22; -inf gives 0, NaN stays; results below 2**-126
// are 0. asm: CuTe lacks it.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler cannot know that it was known before: nothing computed from it moves to before this call.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ std::uint64_t opaque(std::uint64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Issues an instruction of CuTe whose asm does not name memory; the compiler moves no load or store across it.
template <typename Instruction>
__device__ __forceinline__ void ordered(Instruction instruction) {
  asm volatile("" ::: "memory");
  instruction();
  asm volatile("" ::: "memory");
}

}  // namespace zipvl::cuda::ptx
