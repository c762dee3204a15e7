// The inputs of the tensor-core kernels: element types and head dimensions, named once. Pure C++; plans read it.
#pragma once

#include <cstdint>
#include <string>

#include "common/text.h"

namespace zipvl::cuda {

enum class Element { kFloat16, kBFloat16 };

// The head dims that kernels are compiled for; CMakeLists.txt lists the same in ZIPVL_HEAD_DIMS.
constexpr std::int64_t kHeadDims[] = {64, 96, 128, 256};

// Why the tensor-core kernels do not take inputs of this kind; empty where they do.
inline std::string why_not_element(bool half_precision, std::int64_t head_dim) {
  if (!half_precision) {
    return "the kernels take float16 and bfloat16";
  }
  for (const std::int64_t taken : kHeadDims) {
    if (head_dim == taken) {
      return "";
    }
  }
  return join("the kernels take head_dim 64, 96, 128 and 256, got ", head_dim);
}

}  // namespace zipvl::cuda
