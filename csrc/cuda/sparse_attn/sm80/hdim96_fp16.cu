#include "cuda/sparse_attn/sm80/launch_kernel.cuh"

namespace zipvl::cuda::attn::sm80 {
template cudaError_t launch_kernel<__half, 96>(const SparseAttnParams&, cudaStream_t);
}  // namespace zipvl::cuda::attn::sm80
