#include "cuda/ops/device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "ops/checks.h"

namespace zipvl::cuda {
namespace {

constexpr int kMostDevices = 64;

// An attribute of the device, asked once: the runtime's own call takes a microsecond.
template <cudaDeviceAttr Attribute>
int attribute(int device) {
  static std::array<std::atomic<int>, kMostDevices> known{};  // value + 1; 0: not asked yet
  if (device < 0 || device >= kMostDevices) {
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

// A variable of the environment that is neither empty nor 0.
bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && std::string_view(value) != "" && std::string_view(value) != "0";
}

[[maybe_unused]] bool sm80_is_forced() { return is_set("ZIPVL_FORCE_SM80"); }

}  // namespace

KernelFamily kernel_family([[maybe_unused]] int device) {
#ifdef ZIPVL_HAS_SM90
  constexpr int kHopper = 9;
  if (attribute<cudaDevAttrComputeCapabilityMajor>(device) == kHopper && !sm80_is_forced()) {
    return KernelFamily::kSm90;
  }
#endif
  return KernelFamily::kSm80;
}

int multiprocessors(int device) { return attribute<cudaDevAttrMultiProcessorCount>(device); }

int shared_bytes_per_block(int device) { return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device); }

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

bool takes_unchecked_kernels() { return is_set("ZIPVL_UNCHECKED_KERNELS"); }

bool has_dependent_launch(int device) {
  constexpr int kFirst = 9;
  return attribute<cudaDevAttrComputeCapabilityMajor>(device) >= kFirst;
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
