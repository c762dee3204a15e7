// Whether counts and positions may be read on the host while an op runs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

namespace zipvl::aten {

// True for CPU tensors. On any other device a read would wait for the device, so the ops compute every place and mask.
// ZIPVL_NO_HOST_READS in the environment makes the CPU go that way too, which is how it is tested without a GPU.
inline bool host_may_read(const torch::stable::Tensor& tensor) {
  static const bool forbidden = std::getenv("ZIPVL_NO_HOST_READS") != nullptr;
  return tensor.is_cpu() && !forbidden;
}

}  // namespace zipvl::aten
