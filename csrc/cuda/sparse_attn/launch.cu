#include "cuda/sparse_attn/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace zipvl::cuda::attn::sm90 {
namespace {

template <typename ElementType>
cudaError_t launch_for(const SparseAttnParams& params, const std::int32_t* seen, int num_sms, cudaStream_t stream) {
  switch (params.head_dim) {
    case 64:
      return launch_kernel<ElementType, 64>(params, seen, num_sms, stream);
    case 96:
      return launch_kernel<ElementType, 96>(params, seen, num_sms, stream);
    case 128:
      return launch_kernel<ElementType, 128>(params, seen, num_sms, stream);
    case 256:
      return launch_kernel<ElementType, 256>(params, seen, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_sparse_attn(const SparseAttnParams& params, const std::int32_t* seen, int num_sms,
                               cudaStream_t stream) {
  return params.element == Element::kFloat16 ? launch_for<__half>(params, seen, num_sms, stream)
                                             : launch_for<__nv_bfloat16>(params, seen, num_sms, stream);
}

}  // namespace zipvl::cuda::attn::sm90
