// Launch of the portable kernel (sm_80 and later). No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sparse_attn/params.h"

namespace zipvl::cuda {

// A scale not above 0, a head_dim that SparseAttnParams does not name, or a grid that does not fit, is
// cudaErrorInvalidValue. The packed workspace is not used.
cudaError_t launch_sparse_attn_sm80(const SparseAttnParams& params, cudaStream_t stream);

namespace attn::sm80 {
// One instantiation, in a file of its own so that they compile side by side.
template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& params, cudaStream_t stream);
}  // namespace attn::sm80

}  // namespace zipvl::cuda
