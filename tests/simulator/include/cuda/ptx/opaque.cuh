#pragma once

namespace zipvl::cuda::ptx {
inline int opaque(int x) { return x; }
}  // namespace zipvl::cuda::ptx
