// From a problem's element type and head dim to the instantiation that CMake made for them.
#include "cuda/common/dispatch.h"
#include "cuda/sparse_attn/params.h"

namespace zipvl::cuda {

// Defined in <family>/launch.cuh.
namespace sparse_attn::sm80 {
template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& params, cudaStream_t stream);
}  // namespace sparse_attn::sm80
namespace sparse_attn::sm90 {
template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& params, const std::int32_t* seen, int num_sms, cudaStream_t stream);
template <typename ElementType, int HeadDim>
cudaError_t launch_ranged_kernel(const SparseAttnParams& params, int num_sms, cudaStream_t stream);
}  // namespace sparse_attn::sm90

cudaError_t launch_sparse_attn_sm80(const SparseAttnParams& params, cudaStream_t stream) {
  constexpr std::int64_t kMaxBatches = 65535;                 // gridDim.y
  constexpr std::int64_t kMaxTokens = std::int64_t{1} << 21;  // gridDim.z at 64 rows a block, less one
  if (params.batch < 1 || params.batch > kMaxBatches || params.tokens < 1 || params.tokens > kMaxTokens ||
      !(params.scale > 0.0F)) {
    return cudaErrorInvalidValue;
  }
  return dispatch(params.element, params.head_dim, [&]<typename ElementType, int HeadDim>() {
    return sparse_attn::sm80::launch_kernel<ElementType, HeadDim>(params, stream);
  });
}

#ifdef ZIPVL_HAS_SM90
cudaError_t sparse_attn::sm90::launch_sparse_attn(const SparseAttnParams& params, const std::int32_t* seen, int num_sms,
                                                  cudaStream_t stream) {
  return dispatch(params.element, params.head_dim, [&]<typename ElementType, int HeadDim>() {
    return params.ranges.range != nullptr ? launch_ranged_kernel<ElementType, HeadDim>(params, num_sms, stream)
                                          : launch_kernel<ElementType, HeadDim>(params, seen, num_sms, stream);
  });
}
#endif

}  // namespace zipvl::cuda
