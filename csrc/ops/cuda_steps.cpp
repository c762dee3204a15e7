#ifdef ZIPVL_CUDA_OPS
#include "ops/cuda_steps.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cuda/common/launch.h"

namespace zipvl::cuda {
namespace {

// A variable of the environment that is neither empty nor 0.
bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && std::string_view(value) != "" && std::string_view(value) != "0";
}

// One call of the C shim: the dispatcher by name, which torch::stable::empty goes through, costs the host several times
// as much.
Tensor make_empty(const std::int64_t* sizes, const std::int64_t* strides, std::size_t dims, ScalarType type,
                  const Tensor& like) {
  const auto shim_type = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(dims), sizes, strides, shim_type,
                                                  aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace

KernelFamily kernel_family(int device) {
  return runs_hopper_code(device) && !is_set("ZIPVL_FORCE_SM80") ? KernelFamily::kSm90 : KernelFamily::kSm80;
}

int num_sms(int device) { return device_attribute<cudaDevAttrMultiProcessorCount>(device); }

int shared_bytes_per_block(int device) { return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device); }

Tensor empty(std::initializer_list<std::int64_t> sizes, ScalarType type, const Tensor& like) {
  constexpr std::size_t kMaxDims = 4;
  std::int64_t strides[kMaxDims] = {};
  std::int64_t stride = 1;
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<std::int64_t>(sizes.begin()[dim], 1);
  }
  return make_empty(sizes.begin(), strides, sizes.size(), type, like);
}

Tensor empty_strided(std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> strides,
                     ScalarType type, const Tensor& like) {
  return make_empty(sizes.begin(), strides.begin(), sizes.size(), type, like);
}

Tensor empty_attention_output(std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t head_dim,
                              const Tensor& like) {
  return empty_strided({batch, heads, tokens, head_dim}, {tokens * heads * head_dim, head_dim, heads * head_dim, 1},
                       like.scalar_type(), like);
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

bool rows_are_aligned(const Tensor& x) {
  constexpr std::int64_t kBytes = 16;
  bool aligned = reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kBytes == 0;
  for (std::int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    aligned =
        aligned && (x.size(dim) == 1 || x.stride(dim) * static_cast<std::int64_t>(x.element_size()) % kBytes == 0);
  }
  return aligned;
}

checks::AttentionSizes sizes_like(const Tensor& q) {
  return {q.size(0), q.size(1), q.size(1), q.size(2), q.size(2), q.size(3)};
}

ops::Implementation implementation_of(KernelFamily family, const std::string& reason) {
  if (!reason.empty()) {
    return {"aten", reason};
  }
  return {family == KernelFamily::kSm90 ? "sm90" : "sm80", ""};
}

}  // namespace zipvl::cuda
#endif
