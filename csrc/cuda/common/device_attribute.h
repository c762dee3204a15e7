// Attributes of devices, asked once: the runtime's own call takes a microsecond.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace zipvl::cuda {

template <cudaDeviceAttr Attribute>
int device_attribute(int device) {
  constexpr int kMaxDevices = 64;
  static std::array<std::atomic<int>, kMaxDevices> known{};  // value + 1; 0: not asked yet
  if (device < 0 || device >= kMaxDevices) {
    int value = 0;
    cudaDeviceGetAttribute(&value, Attribute, device);
    return value;
  }
  int value = known[static_cast<std::size_t>(device)].load(std::memory_order_relaxed) - 1;
  if (value < 0) {
    cudaDeviceGetAttribute(&value, Attribute, device);
    known[static_cast<std::size_t>(device)].store(value + 1, std::memory_order_relaxed);
  }
  return value;
}

}  // namespace zipvl::cuda
