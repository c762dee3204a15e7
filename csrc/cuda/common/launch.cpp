#include "cuda/common/launch.h"

namespace zipvl::cuda {

bool runs_hopper_code([[maybe_unused]] int device) {
#ifdef ZIPVL_HAS_SM90
  constexpr int kHopper = 9;
  return device_attribute<cudaDevAttrComputeCapabilityMajor>(device) == kHopper;
#else
  return false;
#endif
}

}  // namespace zipvl::cuda
