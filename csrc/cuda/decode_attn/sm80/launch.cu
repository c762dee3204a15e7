// Picks the kernels of a dtype and head dim.
#include "cuda/common/dispatch.h"
#include "cuda/decode_attn/params.h"

namespace zipvl::cuda {
namespace decode_attn::sm80 {

// Defined in launch.cuh, instantiated by instantiate.cu.in.
template <typename ElementType, int D>
cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream);
template <typename ElementType, int D>
cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream);

}  // namespace decode_attn::sm80

cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream) {
  return dispatch(params.element, params.head_dim, [&]<typename ElementType, int D>() {
    return decode_attn::sm80::launch_decode_attn<ElementType, D>(params, stream);
  });
}

cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream) {
  return dispatch(params.attn.element, params.attn.head_dim, [&]<typename ElementType, int D>() {
    return decode_attn::sm80::launch_decode_attn_quantized<ElementType, D>(params, stream);
  });
}

}  // namespace zipvl::cuda
