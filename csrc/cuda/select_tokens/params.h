// Launches of token selection on CUDA: how many tokens (the budget) and which (the highest ranks). No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

struct ProbeScoresParams;

// Strides are in elements. csrc/cuda/select_tokens/plan.h gives the last group of fields.
struct SelectTokensParams {
  const float* budget_score;  // [batch, tokens]
  const float* rank_score;    // [batch, tokens]
  const bool* keep_mask;      // [batch, tokens], or null: none is kept whatever its score
  const bool* token_mask;     // [batch, tokens], or null: every token is real
  // [batch]: real tokens from this position on are kept, beside those of keep_mask. Null: the last keep_last ones.
  const std::int32_t* keep_from;
  std::int32_t* index;                                                            // [batch, tokens], contiguous
  std::int32_t* count;                                                            // [batch], contiguous
  std::int64_t budget_stride[2], rank_stride[2], keep_stride[2], mask_stride[2];  // batch, token
  std::int64_t batch;
  int tokens;
  int min_tokens;  // at most `tokens`
  int keep_last;   // at most `tokens`
  double tau;
  double ratio;      // 0: the budget is by tau
  double max_ratio;  // of the real tokens: the budget is no larger

  int blocks_per_row;    // that share a row's tokens
  int tokens_per_block;  // 4,096, 8,192 or 16,384
  int row_groups;        // grid only: rows worked on at once
  void* workspace;       // grid only: [batch, row_workspace_bytes], any content; else null
  std::int64_t row_workspace_bytes;
};

// blocks_per_row 1: a block a row. More: each of row_groups groups of blocks_per_row blocks takes rows in turn; all
// blocks of the launch must fit the device at once.
cudaError_t launch_select_tokens(const SelectTokensParams& params, cudaStream_t stream);

// A cluster of blocks_per_row blocks a row, of at most 8,192 tokens each; sm_90.
cudaError_t launch_select_tokens_cluster(const SelectTokensParams& params, cudaStream_t stream);

// A block a row, which makes the scores of `from.sums` (budget_score and rank_score are not read); sm_90. To be
// launched right after the kernel that writes them, and that kernel right after the one that draws the probes, if one
// does. At most plan::kSelectTokensPerCopy tokens.
cudaError_t launch_select_sums(const SelectTokensParams& params, const ProbeScoresParams& from, cudaStream_t stream);

}  // namespace zipvl::cuda
