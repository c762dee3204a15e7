// 2**x on the special function unit.
#pragma once

namespace zipvl::cuda::ptx {

// Relative error at most 2**-22; -inf gives 0, NaN stays; results below 2**-126 are 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace zipvl::cuda::ptx
