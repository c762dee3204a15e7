// Launches of kernels: the one place that fills in a launch configuration, and what it asks of the device. A dependent
// launch (programmatic dependent launch) may begin while the kernel before it in the stream ends, where the device runs
// code that knows of it. Such a kernel calls ptx::wait_on_dependent_grids before it touches memory that another wrote,
// or that another may still read.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace zipvl::cuda {

constexpr std::int64_t kMaxGridYZ = 65535;  // gridDim.y and gridDim.z

// An attribute of a device, asked once: the runtime's own call takes a microsecond.
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

// Whether this device runs the code compiled for Hopper, and so has dependent launches. Elsewhere it runs that of
// compute capability 8.0, in which wait_on_dependent_grids is nothing: a dependent launch could read what is not
// written yet.
bool runs_hopper_code(int device);

// Allows the kernel so many bytes of dynamic shared memory on the current device. Allowances only grow, so that a
// launch of one thread of the host never finds another's smaller one, and each is asked of the driver once: that call
// takes as long as a tenth of a launch. max_carveout: shared memory is preferred over L1 to the full.
inline cudaError_t allow_shared_bytes(const void* kernel, int device, unsigned bytes, bool max_carveout = false) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, unsigned> allowed;
  const std::lock_guard lock(mutex);
  const auto [known, is_new] = allowed.try_emplace({kernel, device}, 0);
  if (!is_new && bytes <= known->second) {
    return cudaSuccess;
  }
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess && max_carveout) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) {
    allowed.erase(known);
    return error;
  }
  known->second = bytes;
  return cudaSuccess;
}

struct LaunchOptions {
  dim3 grid;
  unsigned threads = 0;       // of a block
  unsigned shared_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;       // blocks of a thread-block cluster along x, sm_90; 1: none
  bool dependent = false;     // a dependent launch where the device has them
  bool max_carveout = false;  // shared memory is preferred over L1 to the full; a change between two kernels stalls
};

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const LaunchOptions& options, cudaStream_t stream,
                          const Args&... args) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  if (options.shared_bytes > 0 || options.max_carveout) {
    if (const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), device,
                                                     options.shared_bytes, options.max_carveout);
        error != cudaSuccess) {
      return error;
    }
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = options.grid;
  config.blockDim = dim3(options.threads);
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (options.dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = runs_hopper_code(device) ? 1 : 0;
  }
  if (options.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {options.cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Short forms for dependent launches. cluster: as in LaunchOptions.
template <typename... Params, typename... Args>
cudaError_t launch_dependent_clusters(void (*kernel)(Params...), unsigned cluster, dim3 grid, unsigned threads,
                                      unsigned shared_bytes, cudaStream_t stream, const Args&... args) {
  return launch_kernel(kernel, {grid, threads, shared_bytes, cluster, /*dependent=*/true}, stream, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, unsigned threads, unsigned shared_bytes,
                             cudaStream_t stream, const Args&... args) {
  return launch_dependent_clusters(kernel, 1, grid, threads, shared_bytes, stream, args...);
}

}  // namespace zipvl::cuda
