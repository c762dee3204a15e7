#include "cuda/sparse_attn/sm90/launch_kernel.cuh"

namespace zipvl::cuda::attn::sm90 {
template cudaError_t launch_kernel<__half, 64>(const SparseAttnParams&, const std::int32_t*, int, cudaStream_t);
}  // namespace zipvl::cuda::attn::sm90
