#pragma once

#include <cmath>

namespace zipvl::cuda::ptx {
inline float exp2(float x) { return std::exp2f(x); }
}  // namespace zipvl::cuda::ptx
