// How sparse_attn runs over ATen: one product among the selected tokens, or, where rows see different keys
// (all_queries) or the count is not known to the host, blocks of rows with a mask.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

struct SparseAttnProblem {
  std::int64_t batch, query_heads, kv_heads, tokens, head_dim;
  std::int64_t keys;  // most selected tokens a row can have; `tokens` where only the device knows
  bool causal, all_queries, count_on_host;
};

struct SparseAttnPlan {
  bool masked;                  // rows go in blocks with a mask instead of one causal product
  std::int64_t rows_per_block;  // of a masked block
  std::int64_t mask_bytes;      // of one block
  double flops;                 // at `keys` selected tokens, causal halves included

  std::string describe() const;
};

SparseAttnPlan plan_sparse_attn(const SparseAttnProblem& problem);

}  // namespace zipvl::plan
