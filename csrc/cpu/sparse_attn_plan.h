// How sparse_attn runs over ATen: blocks of queries against the keys they see, sized so that the scores of a block stay
// within a fixed size whatever the number of heads and keys.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

struct SparseAttnProblem {
  std::int64_t batch, query_heads, kv_heads, tokens, head_dim;
  std::int64_t keys;  // most selected tokens a row can have; `tokens` where only the device knows
  bool causal, all_queries, count_on_host;
  std::int64_t threads;  // of the CPU; 1 on another device
};

struct SparseAttnPlan {
  std::int64_t rows_per_block;   // queries of a block, all heads
  std::int64_t head_tasks;       // run side by side, each with as many key/value heads
  std::int64_t blocks;           // of one batch row with `keys` selected tokens
  std::int64_t workspace_bytes;  // scores, weights and mask of a block, and one batch row's gathered K and V
  double flops;                  // of the matrix products at `keys` selected tokens, without what causal hides

  std::string describe() const;
};

SparseAttnPlan plan_sparse_attn(const SparseAttnProblem& problem);

}  // namespace zipvl::plan
