// Launch of the Hopper kernel. No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sparse_attn/params.h"

namespace zipvl::cuda::attn::sm90 {

// Rows of a key block, whatever the head dimension: packed K and V must have zeros from a batch row's count up to the
// next multiple or the capacity, past which the copy engine reads 0.
constexpr int kPackedRows = 128;

// params.k_packed and v_packed hold the selected rows already; scale is above 0, batch at most 64, count * blocks fits
// an int. seen: AttnParams::seen.
cudaError_t launch_sparse_attn(const SparseAttnParams& params, const std::int32_t* seen, int num_sms,
                               cudaStream_t stream);

// One instantiation, in a file of its own so that they compile side by side.
template <typename ElementType, int HeadDim>
cudaError_t launch_kernel(const SparseAttnParams& params, const std::int32_t* seen, int num_sms, cudaStream_t stream);

}  // namespace zipvl::cuda::attn::sm90
