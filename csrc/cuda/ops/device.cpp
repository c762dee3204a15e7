#include "cuda/ops/device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdlib>
#include <string_view>

#include "cuda/common/launch.h"
#include "ops/checks.h"

namespace zipvl::cuda {
namespace {

// A variable of the environment that is neither empty nor 0.
bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && std::string_view(value) != "" && std::string_view(value) != "0";
}

bool sm80_is_forced() { return is_set("ZIPVL_FORCE_SM80"); }

}  // namespace

KernelFamily kernel_family(int device) {
  return runs_hopper_code(device) && !sm80_is_forced() ? KernelFamily::kSm90 : KernelFamily::kSm80;
}

int num_sms(int device) { return device_attribute<cudaDevAttrMultiProcessorCount>(device); }

int shared_bytes_per_block(int device) { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device); }

// One call of the C shim: the dispatcher by name, which torch::stable::empty goes through, costs the host several times
// as much.
Tensor empty_strided(std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> strides,
                     ScalarType type, const Tensor& like) {
  const auto shim_type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.begin(),
                                                  strides.begin(), shim_type, aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_attention_output(const Tensor& q) {
  const std::int64_t B = q.size(0), H = q.size(1), N = q.size(2), D = q.size(3);
  return empty_strided({B, H, N, D}, {N * H * D, D, H * D, 1}, q.scalar_type(), q);
}

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    checks::fail(op, "kernel launch failed: ", cudaGetErrorString(error));
  }
}

}  // namespace zipvl::cuda
