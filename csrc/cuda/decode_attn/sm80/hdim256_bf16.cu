#include "cuda/decode_attn/sm80/launch_kernel.cuh"

namespace zipvl::cuda::decode {
ZIPVL_INSTANTIATE_DECODE_ATTN(__nv_bfloat16, 256)
}  // namespace zipvl::cuda::decode
