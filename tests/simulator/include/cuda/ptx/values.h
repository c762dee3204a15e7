// Narrow floating-point numbers by their bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::ptx {

template <typename T>
[[gnu::no_sanitize_address]] float value_of(std::uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const auto narrow = static_cast<std::uint16_t>(i);
      T element;
      std::memcpy(&element, &narrow, sizeof narrow);
      values[i] = static_cast<float>(element);
    }
    return values;
  }();
  return table[bits];
}

}  // namespace zipvl::cuda::ptx
