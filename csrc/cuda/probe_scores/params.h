// The parameters of probe_scores' kernels, how a plan fills them, and the launch of either family. No Torch.
//
// Rows: the probes of the query heads that share a key/value head, row = probe * group + head, `rows` of them, padded
// to `rows_padded`. Two passes over the scores of rows and keys, neither of which writes a score: the first finds each
// row's log-sum-exp, the second adds up each key's weights. On Hopper one kernel takes both where inputs are short.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/probe_draw.h"
#include "cuda/common/element.h"
#include "cuda/probe_scores/plan.h"

namespace zipvl::cuda {

struct ProbeScoresParams {
  const void* q;                    // [batch, query_heads, tokens - first_query, head_dim], unit last stride
  std::int64_t q_stride[3];         // of dimensions 0 to 2, in elements
  const void* k;                    // [batch, kv_heads, tokens, head_dim], unit last stride
  std::int64_t k_stride[3];         // of dimensions 0 to 2, in elements
  const std::int32_t* probe_index;  // [batch, probes]; what is no position is no probe; null: every row's are `draw`'s
  std::int64_t probe_stride[2];     // in elements
  ProbeDraw draw;                   // where cluster_blocks > 0 and there is no mask: nobody reads a probe often
  // [batch, queries]: the last key that a query may see, or null: under `causal` its own position
  const std::int32_t* last_key;
  std::int64_t last_key_stride[2];  // in elements
  int first_query;                  // position of q's first row: queries are those of the last tokens
  const bool* token_mask;           // [batch, tokens], or null: every token is real
  std::int64_t mask_stride[2];      // in elements
  // [batch, tokens], contiguous; or null where cluster_blocks > 0: the sums are all that is wanted
  float* accumulated;
  float* normalized;  // [batch, tokens], contiguous

  // Workspace, each aligned to 256 bytes and contiguous (cuda/probe_scores/plan.h). One kernel for both passes has only
  // `sums`.
  void* probe_rows;           // [batch, kv_heads, rows, head_dim]
  std::int32_t* row_limit;    // [batch, rows_padded]: the last key a row may see; -1 where the row is no probe
  std::int32_t* unit_range;   // [batch, rows_padded / 64, 2]: minimum and maximum limit of 64 rows
  std::uint32_t* mask_words;  // [batch, words]: token_mask as bits, 0 past the end; null where there is no mask
  float* partial;             // [batch, kv_heads, splits, rows_padded, 2]: maximum and sum of a row over a key chunk
  float* row_lse;             // [batch, kv_heads, rows_padded]: log2 of the sum of a row's 2**(scale_log2 * score)
  float* sums;                // [batch, kv_heads, row_splits, tokens]: weights of a key, summed over rows

  Element element;
  int head_dim;  // one of kHeadDims
  int batch, query_heads, kv_heads, tokens, probes;
  int rows, rows_padded, words;
  int cluster_blocks;  // of the kernel that takes both passes and gathers by itself; 0: launches as below
  int chunk_keys, splits, row_splits;
  bool causal;
  bool negate;       // the scale is negative: the rows are gathered with their sign flipped
  float scale_log2;  // |scale| * log2(e), greater than 0
  int num_sms;
};

inline void take_plan(ProbeScoresParams& params, const plan::ProbeScoresCudaPlan& plan) {
  params.rows = static_cast<int>(plan.rows);
  params.rows_padded = static_cast<int>(plan.rows_padded);
  params.words = static_cast<int>(plan.words);
  params.cluster_blocks = static_cast<int>(plan.cluster_blocks);
  params.chunk_keys = static_cast<int>(plan.chunk_keys);
  params.splits = static_cast<int>(plan.splits);
  params.row_splits = static_cast<int>(plan.row_splits);
}

// bytes: device memory of space.bytes bytes, aligned to 256.
inline void place_workspace(ProbeScoresParams& params, const plan::ProbeScoresWorkspace& space, unsigned char* bytes) {
  params.probe_rows = bytes + space.probe_rows;
  params.row_limit = reinterpret_cast<std::int32_t*>(bytes + space.row_limit);
  params.unit_range = reinterpret_cast<std::int32_t*>(bytes + space.unit_range);
  params.mask_words =
      params.token_mask == nullptr ? nullptr : reinterpret_cast<std::uint32_t*>(bytes + space.mask_words);
  params.partial = reinterpret_cast<float*>(bytes + space.partial);
  params.row_lse = reinterpret_cast<float*>(bytes + space.row_lse);
  params.sums = reinterpret_cast<float*>(bytes + space.sums);
}

// Hopper's wgmma and TMA; k must satisfy probe_scores_fits_sm90.
cudaError_t launch_probe_scores_sm90(const ProbeScoresParams& params, cudaStream_t stream);
bool probe_scores_fits_sm90(const ProbeScoresParams& params);

// mma.sync and cp.async; k must satisfy probe_scores_fits_sm80: its rows begin at multiples of 16 bytes.
cudaError_t launch_probe_scores_sm80(const ProbeScoresParams& params, cudaStream_t stream);
bool probe_scores_fits_sm80(const ProbeScoresParams& params);

}  // namespace zipvl::cuda
