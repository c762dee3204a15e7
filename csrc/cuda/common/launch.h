// Launches of kernels: the one place that fills in a launch configuration, and what it asks of the device. A dependent
// launch (programmatic dependent launch) may begin while the kernel before it in the stream ends, where the device runs
// code that knows of it. Such a kernel calls ptx::wait_on_dependent_grids before it touches memory that another wrote,
// or that another may still read.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

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

struct LaunchOptions {
  dim3 grid;
  unsigned threads = 0;       // of a block
  unsigned shared_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;       // blocks of a thread-block cluster along x, sm_90; 1: none
  bool dependent = false;     // a dependent launch where the device has them
  bool max_carveout = false;  // shared memory is preferred over L1 to the full; a change between two kernels stalls
};

// For kernels that were allowed their dynamic shared memory before, or need no more than 48 KB.
template <typename... Params, typename... Args>
cudaError_t launch_allowed_kernel(void (*kernel)(Params...), const LaunchOptions& options, cudaStream_t stream,
                                  const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = options.grid;
  config.blockDim = dim3(options.threads);
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (options.dependent) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
      return error;
    }
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

// Allows the kernel its dynamic shared memory, then launches it.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const LaunchOptions& options, cudaStream_t stream,
                          const Args&... args) {
  // The attributes are the kernel's, and another thread of the host may ask for less between here and the launch.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (options.shared_bytes > 0) {
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(options.shared_bytes));
        error != cudaSuccess) {
      return error;
    }
  }
  if (options.max_carveout) {
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                       cudaSharedmemCarveoutMaxShared);
        error != cudaSuccess) {
      return error;
    }
  }
  return launch_allowed_kernel(kernel, options, stream, args...);
}

// Short forms of launch_allowed_kernel for dependent launches. cluster: as in LaunchOptions.
template <typename... Params, typename... Args>
cudaError_t launch_dependent_clusters(void (*kernel)(Params...), unsigned cluster, dim3 grid, unsigned threads,
                                      unsigned shared_bytes, cudaStream_t stream, const Args&... args) {
  return launch_allowed_kernel(kernel, {grid, threads, shared_bytes, cluster, /*dependent=*/true}, stream, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, unsigned threads, unsigned shared_bytes,
                             cudaStream_t stream, const Args&... args) {
  return launch_dependent_clusters(kernel, 1, grid, threads, shared_bytes, stream, args...);
}

}  // namespace zipvl::cuda
