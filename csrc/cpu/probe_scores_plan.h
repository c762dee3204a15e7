// How probe_scores splits its rows when it runs over ATen: blocks whose score matrix stays within a fixed size, so that
// memory beside the inputs and outputs is O(N) whatever the number of heads and probes.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

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

}  // namespace zipvl::plan
