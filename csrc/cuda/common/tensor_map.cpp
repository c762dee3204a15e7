#include "cuda/common/tensor_map.h"

namespace zipvl::cuda {
namespace {

constexpr std::uintptr_t kAlignment = 16;
constexpr std::int64_t kElementBytes = 2;

// The driver's function, found once through the runtime, so that the library does not link libcuda.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kFirstVersion = 12000;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kFirstVersion, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

bool tensor_map_fits(const TensorMapView& view) {
  if (reinterpret_cast<std::uintptr_t>(view.data) % kAlignment != 0) {
    return false;
  }
  for (int i = 0; i < 3; ++i) {
    const std::int64_t bytes = view.stride[i] * kElementBytes;
    if (view.size[i + 1] > 1 && (bytes <= 0 || bytes % static_cast<std::int64_t>(kAlignment) != 0)) {
      return false;
    }
  }
  return true;
}

cudaError_t make_tensor_map(const TensorMapView& view, CUtensorMap* map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) {
    return cudaErrorNotSupported;
  }
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    size[i] = view.size[i];
    box[i] = view.box[i];
  }
  for (int i = 0; i < 3; ++i) {
    // The stride of a dimension of one element is never used, but must be valid.
    stride[i] = static_cast<cuuint64_t>(view.size[i + 1] > 1 ? view.stride[i] * kElementBytes : kAlignment);
  }
  const CUtensorMapDataType type =
      view.element == Element::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(view.data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace zipvl::cuda
