// How probe_scores and sparse_attn split their rows when they run over ATen: blocks whose scores stay within a fixed
// size, so that memory beside inputs and outputs is O(N) whatever the number of heads and probes. Pure C++.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

// One task a head where the threads share the heads evenly or nearly so; one task of all heads otherwise, whose matrix
// products then use the threads themselves.
constexpr std::int64_t head_tasks(std::int64_t kv_heads, std::int64_t threads) {
  const bool even = threads > 1 && kv_heads % threads == 0;
  const bool nearly_even = threads > 1 && kv_heads >= 4 * threads;
  return even || nearly_even ? kv_heads : 1;
}

struct ProbeScoresProblem {
  std::int64_t batch, query_heads, kv_heads, tokens, probes, head_dim;
  std::int64_t threads;  // of the CPU; 1 on another device
};

struct ProbeScoresPlan {
  std::int64_t heads_per_block;   // of one key/value head's group
  std::int64_t probes_per_block;  // rows of a block = heads_per_block * probes_per_block
  std::int64_t head_tasks;        // run side by side, each with as many key/value heads
  std::int64_t blocks;            // over the whole call
  std::int64_t workspace_bytes;   // most bytes live at once beside inputs and outputs
  double flops;                   // of the matrix products

  std::string describe() const;
};

ProbeScoresPlan plan_probe_scores(const ProbeScoresProblem& problem);

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

// Attention with a window on the CPU: blocks of rows that lie close together, one thread a block.
struct WindowAttnPlan {
  std::int64_t rows_per_block;  // queries of a block, all heads
  std::int64_t span;            // most positions from the first to the last of them
};

// `window`: most positions that a row sees one after the other; `keys`: most keys that it sees outside of them.
WindowAttnPlan plan_window_attn(std::int64_t query_heads, std::int64_t window, std::int64_t keys);

}  // namespace zipvl::plan
