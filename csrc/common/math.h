// Integer arithmetic that host and device code share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZIPVL_HOST_DEVICE __host__ __device__
#else
#define ZIPVL_HOST_DEVICE
#endif

namespace zipvl {

// a / b rounded up; b > 0, a >= 0.
template <typename T>
ZIPVL_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// The least multiple of b that is at least a.
template <typename T>
ZIPVL_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace zipvl
