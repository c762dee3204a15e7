#include "cuda/layer/plan.h"

#include <algorithm>

#include "common/math.h"
#include "common/text.h"

namespace zipvl::plan {
namespace {

constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kWordBytes = 4, kElementBytes = 2;
// Of a row's sums, which one multiprocessor reads. On an H200 at 28/4 heads the layer took 38.4 us, was 40.1, with 96
// KiB of them (2,048 tokens), 49.6, was 50.8, with 141, and 66.6, was 66.0, with 192.
constexpr std::int64_t kMaxSumsBytes = std::int64_t{160} << 10;

}  // namespace

LayerPlan plan_layer(const LayerProblem& problem, const ProbeScoresCudaPlan& scores, const SelectTokensPlan& select,
                     const SparseAttnCudaPlan& attention) {
  LayerPlan plan{};
  plan.native =
      scores.reason.empty() && select.team != SelectTeam::kNone && attention.kernel != SparseAttnKernel::kAten;
  if (!plan.native) {
    return plan;
  }
  plan.draws_ahead =
      problem.masked || (!problem.scored && (problem.projects || problem.last_alone || scores.cluster_blocks == 0));
  plan.selects_sums = scores.cluster_blocks > 0 && select.team == SelectTeam::kBlock &&
                      select.tokens_per_block == kSelectTokensPerCopy &&
                      problem.kv_heads * scores.row_splits * problem.tokens * kWordBytes <= kMaxSumsBytes;
  std::int64_t end = 0;
  const auto take = [&end](std::int64_t bytes) {
    const std::int64_t begin = end;
    end += round_up(bytes, kAlignment);
    return begin;
  };
  LayerWorkspace& space = plan.workspace;
  const std::int64_t row_bytes = problem.batch * problem.tokens * kWordBytes;
  space.probe_index = take(plan.draws_ahead ? problem.batch * problem.probes * kWordBytes : 0);
  space.keep_from = take(problem.masked ? problem.batch * kWordBytes : 0);
  space.accumulated = take(plan.selects_sums || problem.scored ? 0 : row_bytes);
  space.normalized = take(plan.selects_sums || problem.scored ? 0 : row_bytes);
  space.probe_scores = take(scores.workspace.bytes);
  space.select_tokens = take(select.workspace_bytes);
  plan.selection_bytes = end;

  end = 0;
  const bool packs = attention.kernel == SparseAttnKernel::kSm90 && !problem.returns_packed;
  const std::int64_t packed_bytes =
      packs ? problem.batch * problem.kv_heads * problem.tokens * problem.head_dim * kElementBytes : 0;
  space.k_packed = take(packed_bytes);
  space.v_packed = take(packed_bytes);
  space.seen = take(attention.seen_tokens && problem.ranged_bytes == 0 ? row_bytes : 0);
  plan.attention_bytes = end;

  end = std::max(plan.selection_bytes, plan.attention_bytes);
  space.selected = take(problem.extends ? row_bytes : 0);
  space.num_selected = take(problem.extends ? problem.batch * kWordBytes : 0);
  space.ranged = take(problem.ranged_bytes);
  space.bytes = end;
  return plan;
}

std::string LayerPlan::describe() const {
  if (!native) {
    return "zipvl_layer on CUDA: step by step, because a step has no kernel for these inputs";
  }
  return join("zipvl_layer on CUDA: ", draws_ahead ? "" : "no kernel for the draw; ",
              selects_sums ? "selection from the probes' sums; " : "", workspace.bytes, " bytes of workspace, ",
              selection_bytes, " for the selection and then ", attention_bytes, " for the attention");
}

}  // namespace zipvl::plan
