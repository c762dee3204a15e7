// What an op asks of its device before a launch: which kernels it can run, its stream, whether the launch went well.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

namespace zipvl::cuda {

using torch::stable::Tensor;

// sm90: Hopper's own (wgmma, TMA). sm80: mma.sync and cp.async, also what later GPUs run.
enum class KernelFamily { kSm90, kSm80 };

// The family for this device. ZIPVL_FORCE_SM80=1 in the environment, read on every call, takes sm80 on Hopper too.
KernelFamily kernel_family(int device);

int multiprocessors(int device);

// The current stream of the tensor's device.
cudaStream_t stream_of(const Tensor& tensor);

// Throws, naming the op, unless `error` is success.
void check_launch(const char* op, cudaError_t error);

}  // namespace zipvl::cuda
