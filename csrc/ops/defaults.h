// What an absent argument means.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

namespace zipvl::ops {

inline double scale_or_default(std::optional<double> scale, std::int64_t head_dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

}  // namespace zipvl::ops
