#include "plan/zipvl_attn.h"

#include <algorithm>

#include "common/text.h"

namespace zipvl::plan {
namespace {

constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kWordBytes = 4, kElementBytes = 2;

}  // namespace

ZipvlAttnPlan plan_zipvl_attn(const ZipvlAttnProblem& problem, const ProbeScoresCudaPlan& scores,
                              const SelectTokensPlan& select, const SparseAttnCudaPlan& attention) {
  ZipvlAttnPlan plan{};
  plan.native = select.team != SelectTeam::kNone && attention.kernel != SparseAttnKernel::kAten;
  if (!plan.native) {
    return plan;
  }
  std::int64_t end = 0;
  const auto take = [&end](std::int64_t bytes) {
    const std::int64_t begin = end;
    end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  ZipvlAttnWorkspace& space = plan.workspace;
  const std::int64_t row_bytes = problem.batch * problem.tokens * kWordBytes;
  space.probe_index = take(problem.batch * problem.probes * kWordBytes);
  space.keep_from = take(problem.batch * kWordBytes);
  space.accumulated = take(row_bytes);
  space.normalized = take(row_bytes);
  space.probe_scores = take(scores.workspace.bytes);
  space.select_tokens = take(select.workspace_bytes);
  plan.selection_bytes = end;

  end = 0;
  const bool packs = attention.kernel == SparseAttnKernel::kSm90 && !problem.returns_packed;
  const std::int64_t packed_bytes =
      packs ? problem.batch * problem.kv_heads * problem.tokens * problem.head_dim * kElementBytes : 0;
  space.k_packed = take(packed_bytes);
  space.v_packed = take(packed_bytes);
  space.seen = take(attention.seen_tokens ? row_bytes : 0);
  plan.attention_bytes = end;
  space.bytes = std::max(plan.selection_bytes, plan.attention_bytes);
  return plan;
}

std::string ZipvlAttnPlan::describe() const {
  if (!native) {
    return "zipvl_attn on CUDA: step by step, because a step has no kernel for these inputs";
  }
  return join("zipvl_attn on CUDA: ", workspace.bytes, " bytes of workspace, ", selection_bytes,
              " for the selection and then ", attention_bytes, " for the attention");
}

}  // namespace zipvl::plan
