// Launch of a neighbourhood's additions to a selection (docs/ops.md, step 5b). No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

// Strides are in elements: batch, token.
struct ExtendSelectionParams {
  // The selection to extend, [batch, tokens] contiguous and [batch]; the first `count` entries of a row ascend. Null:
  // there is none, and only the real tokens are listed.
  const std::int32_t* index;
  const std::int32_t* count;
  // The extended one, other memory in the same layout: the tokens of `index`, the first num_sinks and the last
  // local_window real ones, and the real ones of extra_mask. Null with `index`.
  std::int32_t* extended_index;
  std::int32_t* extended_count;
  std::int32_t* real_index;  // [batch, tokens], contiguous: the real tokens, ascending, then `tokens`; or null
  std::int32_t* real_count;  // [batch]; null with real_index
  const bool* token_mask;    // [batch, tokens], or null: every token is real
  const bool* extra_mask;    // [batch, tokens], or null: none
  std::int64_t token_stride[2], extra_stride[2];
  std::int64_t batch;
  int tokens, local_window, num_sinks;  // the latter two at most `tokens`
};

cudaError_t launch_extend_selection(const ExtendSelectionParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
