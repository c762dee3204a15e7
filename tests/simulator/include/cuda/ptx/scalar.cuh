#pragma once

#include <cmath>

#include "cuda_on_cpu.h"

namespace zipvl::cuda::ptx {

using emulated::shared_base;

inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - shared_base);
}
inline unsigned char* shared_pointer(std::uint32_t address) {
  return emulated::at_offset(static_cast<std::int32_t>(address));
}

inline float exp2(float x) { return std::exp2f(x); }
template <typename T>
T opaque(T x) {
  return x;
}

}  // namespace zipvl::cuda::ptx
