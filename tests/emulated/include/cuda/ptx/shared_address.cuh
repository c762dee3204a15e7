#pragma once

#include "cuda_on_cpu.h"

namespace zipvl::cuda::ptx {

// Addresses of shared memory are offsets from here; aligned as far as any kernel asks of an address.
alignas(1024) inline thread_local unsigned char shared_base[16];

inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - shared_base);
}
inline unsigned char* shared_pointer(std::uint32_t address) { return shared_base + static_cast<std::int32_t>(address); }

}  // namespace zipvl::cuda::ptx
