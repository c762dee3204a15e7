#include "cuda/sparse_attn/sm80/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace zipvl::cuda {
namespace {

template <typename ElementType>
cudaError_t launch_for(const SparseAttnParams& params, cudaStream_t stream) {
  switch (params.head_dim) {
    case 64:
      return attn::sm80::launch_kernel<ElementType, 64>(params, stream);
    case 96:
      return attn::sm80::launch_kernel<ElementType, 96>(params, stream);
    case 128:
      return attn::sm80::launch_kernel<ElementType, 128>(params, stream);
    case 256:
      return attn::sm80::launch_kernel<ElementType, 256>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_sparse_attn_sm80(const SparseAttnParams& params, cudaStream_t stream) {
  constexpr std::int64_t kMaxBatches = 65535;                 // gridDim.y
  constexpr std::int64_t kMaxTokens = std::int64_t{1} << 21;  // gridDim.z at 64 rows a block, less one
  if (params.batch < 1 || params.batch > kMaxBatches || params.tokens < 1 || params.tokens > kMaxTokens ||
      !(params.scale > 0.0F)) {
    return cudaErrorInvalidValue;
  }
  return params.element == Element::kFloat16 ? launch_for<__half>(params, stream)
                                             : launch_for<__nv_bfloat16>(params, stream);
}

}  // namespace zipvl::cuda
