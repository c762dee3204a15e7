// How many selected tokens stand at or before each token: what a query of all_queries sees under causal attention.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

struct SeenTokensParams {
  std::int32_t* seen;            // [batch, tokens], contiguous
  const std::int32_t* index;     // [batch, tokens]
  std::int64_t index_stride[2];  // in elements
  const std::int32_t* count;     // [batch]
  std::int64_t count_stride;
  std::int64_t batch, tokens;
};

cudaError_t launch_seen_tokens(const SeenTokensParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
