// The place of a producer or a consumer in a ring of buffers, as mbarriers count it.
#pragma once

#include <cstdint>

namespace zipvl::cuda {

// Which of `Stages` buffers, and the phase of its mbarriers: the parity of the pass through the ring.
template <int Stages>
struct PipelineState {
  int index = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++index == Stages) {
      index = 0;
      phase ^= 1;
    }
  }
};

}  // namespace zipvl::cuda
