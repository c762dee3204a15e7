// A ring of buffers between a producer and its consumers.
#pragma once

#include <cstdint>

namespace zipvl::cuda {

// A place in a ring of `Stages` buffers: which buffer, and the parity of the pass through the ring.
template <int Stages>
struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace zipvl::cuda
