// How the whole layer runs over its CUDA kernels: one workspace for all of them.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/probe_scores/plan.h"
#include "cuda/select_tokens/plan.h"
#include "cuda/sparse_attn/plan.h"

namespace zipvl::plan {

struct LayerProblem {
  std::int64_t batch, kv_heads, tokens, head_dim, probes;
  bool masked;                // some tokens may not be real
  bool returns_packed;        // the packed keys and values are results, and no workspace
  bool projects;              // the probes' queries are projected before their scores
  bool scored;                // scores are given
  bool last_alone;            // queries are those of the last tokens alone
  bool extends;               // a neighbourhood adds tokens to the selection
  std::int64_t ranged_bytes;  // of ranged attention (plan_ranged_attn), or 0: the usual one
};

// Byte offsets, each a multiple of 256. What the selection needs and what the attention needs begin at the same byte:
// the kernels run one after the other, and select_tokens is the last to read the former.
struct LayerWorkspace {
  // Until index and count are written:
  std::int64_t probe_index;              // [B, P] int32; unused where nobody draws ahead
  std::int64_t keep_from;                // [B] int32; unused where every token is real
  std::int64_t accumulated, normalized;  // [B, N] float32; unused where the selection reads sums or given scores
  std::int64_t probe_scores;             // ProbeScoresWorkspace
  std::int64_t select_tokens;            // SelectTokensPlan's
  // From then on:
  std::int64_t k_packed, v_packed;  // [B, Hkv, N, D] of a 16-bit dtype; unused where they are results or not needed
  std::int64_t seen;                // [B, N] int32; unused unless SparseAttnCudaPlan asks for it
  // Beside all of these:
  std::int64_t selected, num_selected;  // [B, N], [B] int32: the selection before it is extended
  std::int64_t ranged;                  // RangedAttnWorkspace
  std::int64_t bytes;
};

struct LayerPlan {
  bool native;        // every step has a kernel
  bool draws_ahead;   // a kernel draws the probes; else those that need them do
  bool selects_sums;  // the selection makes the scores of the sums that probe_scores' one kernel leaves
  LayerWorkspace workspace;
  std::int64_t selection_bytes, attention_bytes;  // of the two phases that share the workspace

  std::string describe() const;
};

LayerPlan plan_layer(const LayerProblem& problem, const ProbeScoresCudaPlan& scores, const SelectTokensPlan& select,
                     const SparseAttnCudaPlan& attention);

}  // namespace zipvl::plan
