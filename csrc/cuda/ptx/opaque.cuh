// A value that the compiler knows nothing of.
#pragma once

namespace zipvl::cuda::ptx {

// x, of which the compiler cannot know that it was known before: nothing computed from it moves to before this call.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace zipvl::cuda::ptx
