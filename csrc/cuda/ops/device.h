// What an op asks of its device before a launch: which kernels it can run, its stream, whether the launch went well.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace zipvl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// sm90: Hopper's own (wgmma, TMA). sm80: mma.sync and cp.async, also what later GPUs run.
enum class KernelFamily { kSm90, kSm80 };

// The family for this device. ZIPVL_FORCE_SM80=1 in the environment, read on every call, takes sm80 on Hopper too.
KernelFamily kernel_family(int device);

int num_sms(int device);

int shared_bytes_per_block(int device);  // the most that a block may ask for

// A tensor on the device of `like` whose content is undefined. Strides are in elements.
Tensor empty_strided(std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> strides,
                     ScalarType type, const Tensor& like);

// [B, H, N, D] as attention ops return it: the transposed view of a contiguous [B, N, H, D].
Tensor empty_attention_output(const Tensor& q);

// The current stream of the tensor's device.
cudaStream_t stream_of(const Tensor& tensor);

// Throws, naming the op, unless `error` is success.
void check_launch(const char* op, cudaError_t error);

}  // namespace zipvl::cuda
