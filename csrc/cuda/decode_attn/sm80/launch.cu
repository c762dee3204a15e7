// Picks the kernels of a dtype and head dim.
#include "cuda/decode_attn/sm80/launch.h"

namespace zipvl::cuda {
namespace {

// Calls body.operator()<Element, D>().
template <typename Element, typename Body>
cudaError_t with_head_dim(int head_dim, const Body& body) {
  switch (head_dim) {
    case 64:
      return body.template operator()<Element, 64>();
    case 96:
      return body.template operator()<Element, 96>();
    case 128:
      return body.template operator()<Element, 128>();
    case 256:
      return body.template operator()<Element, 256>();
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Body>
cudaError_t with_element(const DecodeAttnParams& params, const Body& body) {
  return params.bfloat16 ? with_head_dim<__nv_bfloat16>(params.head_dim, body)
                         : with_head_dim<__half>(params.head_dim, body);
}

}  // namespace

cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream) {
  return with_element(
      params, [&]<typename Element, int D>() { return decode::launch_decode_attn<Element, D>(params, stream); });
}

cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream) {
  return with_element(params.attn, [&]<typename Element, int D>() {
    return decode::launch_decode_attn_quantized<Element, D>(params, stream);
  });
}

}  // namespace zipvl::cuda
