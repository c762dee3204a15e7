// What an absent argument means, and what the machine offers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <optional>

namespace zipvl::ops {

inline double scale_or_default(std::optional<double> scale, std::int64_t head_dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

// Threads that work on tensors of q's device can be split over.
inline std::int64_t host_threads(const torch::stable::Tensor& q) {
  return q.is_cpu() ? static_cast<std::int64_t>(torch::stable::get_num_threads()) : 1;
}

}  // namespace zipvl::ops
