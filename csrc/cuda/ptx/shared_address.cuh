// Addresses of the shared window, which the instructions of this folder take.
#pragma once

#include <cstdint>

namespace zipvl::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace zipvl::cuda::ptx
