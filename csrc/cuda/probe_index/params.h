// The parameters and the launch of the probe draw on CUDA, a block a row. No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

struct ProbeIndexParams {
  std::int32_t* out;            // [batch, num_recent + num_random], contiguous
  const bool* token_mask;       // [batch, tokens], or null: every token is real
  std::int64_t mask_stride[2];  // of token_mask, in elements
  std::int64_t batch, tokens;
  std::int64_t first;  // probes are drawn among the tokens from here on, which are those that have queries
  std::int64_t num_recent, num_random;
  std::uint64_t seed;
  // [batch], or null; with token_mask only: the position of the first of the keep_recent last real tokens, and `tokens`
  // where that is no token.
  std::int32_t* keep_from;
  std::int64_t keep_recent;
};

cudaError_t launch_probe_index(const ProbeIndexParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
