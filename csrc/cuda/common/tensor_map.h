// Tensor maps for the copy engine (TMA). No Torch; host code.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/element.h"

namespace zipvl::cuda {

// A rank-4 view [size[3], size[2], size[1], size[0]] of 16-bit elements, innermost first, and the box one copy brings.
struct TensorMapView {
  const void* data;  // aligned to 16 bytes
  Element element;
  std::uint64_t size[4];   // each at least 1
  std::int64_t stride[3];  // of dimensions 1 to 3, in elements; bytes a multiple of 16; dimension 0 is contiguous
  std::uint32_t box[4];    // box[0] * 2 bytes at most 128: one row of the 128-byte swizzle
};

// Whether the copy engine can read such a view: alignment and strides as above.
bool tensor_map_fits(const TensorMapView& view);

// Rows outside the view read as 0. The 128-byte swizzle is on.
cudaError_t make_tensor_map(const TensorMapView& view, CUtensorMap* map);

}  // namespace zipvl::cuda
