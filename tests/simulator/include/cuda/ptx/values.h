// Narrow floating-point numbers as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::ptx {

// By their 16 bits.
template <typename T>
inline const float* const table_of_values = [] {
  static float values[1 << 16];
  for (int i = 0; i < 1 << 16; ++i) {
    const auto narrow = static_cast<std::uint16_t>(i);
    T element;
    std::memcpy(&element, &narrow, sizeof narrow);
    values[i] = static_cast<float>(element);
  }
  return values;
}();

template <typename T>
[[gnu::always_inline, gnu::no_sanitize_address]] inline float value_of(std::uint16_t bits) {
  return table_of_values<T>[bits];
}

}  // namespace zipvl::cuda::ptx
