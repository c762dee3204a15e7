// Zeros in the output rows of tokens that are not real, where attention computes every row. No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

struct ZeroPaddingParams {
  void* out;                    // [batch, tokens, row_bytes], contiguous, aligned to 16 bytes
  const bool* token_mask;       // [batch, tokens]
  std::int64_t mask_stride[2];  // in elements
  std::int64_t batch, tokens;   // batch below 65,536
  std::int64_t row_bytes;       // of all heads of a token, a multiple of 16
};

cudaError_t launch_zero_padding(const ZeroPaddingParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
