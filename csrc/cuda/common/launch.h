// Launches that may begin while the kernel before them in the stream ends (programmatic dependent launch), where the
// device runs code that knows of it. Such a kernel calls ptx::wait_on_dependent_grids before it touches memory that
// another wrote, or that another may still read.
#pragma once

#include <cuda_runtime_api.h>


namespace zipvl::cuda {

// Whether this device runs the code compiled for Hopper, and so has dependent launches. Elsewhere it runs that of
// compute capability 8.0, in which wait_on_dependent_grids is nothing: a dependent launch could read what is not
// written yet.
bool runs_hopper_code(int device);

// cluster: blocks of a thread-block cluster along x, sm_90; 1: none.
template <typename... Params, typename... Args>
cudaError_t launch_dependent_clusters(void (*kernel)(Params...), unsigned cluster, dim3 grid, unsigned threads,
                                      unsigned shared_bytes, cudaStream_t stream, const Args&... args) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = runs_hopper_code(device) ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, unsigned threads, unsigned shared_bytes,
                             cudaStream_t stream, const Args&... args) {
  return launch_dependent_clusters(kernel, 1, grid, threads, shared_bytes, stream, args...);
}

}  // namespace zipvl::cuda
