// From an element type and head dim known at run time to a kernel compiled for them: the one place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <iterator>
#include <utility>

#include "cuda/common/element.h"

namespace zipvl::cuda {

// Calls body.operator()<ElementType>().
template <typename Body>
cudaError_t dispatch_element(Element element, const Body& body) {
  return element == Element::kFloat16 ? body.template operator()<__half>() : body.template operator()<__nv_bfloat16>();
}

// Calls body.operator()<ElementType, HeadDim>(); cudaErrorInvalidValue where no kernel has this head dim.
template <typename Body>
cudaError_t dispatch(Element element, int head_dim, const Body& body) {
  return dispatch_element(element, [&]<typename ElementType>() {
    cudaError_t error = cudaErrorInvalidValue;
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (void)((head_dim == kHeadDims[I] &&
              (error = body.template operator()<ElementType, static_cast<int>(kHeadDims[I])>(), true)) ||
             ...);
    }(std::make_index_sequence<std::size(kHeadDims)>{});
    return error;
  });
}

}  // namespace zipvl::cuda
