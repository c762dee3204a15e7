#include "cpu/probe_scores_plan.h"

#include <algorithm>

#include "common/text.h"
#include "cpu/head_tasks_plan.h"

namespace zipvl::plan {
namespace {

// 2**20 float32 scores are 4 MiB: enough rows to keep a matrix product busy, and the passes over a block (mask,
// softmax, sum) find it in the cache.
constexpr std::int64_t kScoresPerBlock = std::int64_t{1} << 20;
// Probes go up in position, and a block computes only the columns up to its last probe: short blocks skip more of what
// causal hides, and 16 probes of a group's heads are rows enough for a matrix product.
constexpr std::int64_t kMaxProbes = 16;
// A block holds its scores, their softmax and a mask, of 4, 4 and 1 bytes; K of one head as float32 stands beside them.
constexpr std::int64_t kBytesPerScore = 9;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

ProbeScoresPlan plan_probe_scores(const ProbeScoresProblem& problem) {
  const std::int64_t group = problem.query_heads / problem.kv_heads;
  const std::int64_t rows = std::max<std::int64_t>(1, kScoresPerBlock / std::max<std::int64_t>(1, problem.tokens));
  ProbeScoresPlan plan{};
  plan.probes_per_block = std::clamp<std::int64_t>(rows, 1, std::min(problem.probes, kMaxProbes));
  plan.heads_per_block = std::clamp<std::int64_t>(rows / plan.probes_per_block, 1, group);
  plan.head_tasks = head_tasks(problem.kv_heads, problem.threads);
  plan.blocks = problem.batch * problem.kv_heads * ceil_div(group, plan.heads_per_block) *
                ceil_div(problem.probes, plan.probes_per_block);
  const std::int64_t block_scores = plan.heads_per_block * plan.probes_per_block * problem.tokens;
  plan.workspace_bytes = std::min(plan.head_tasks, problem.threads) *
                         (block_scores * kBytesPerScore + problem.tokens * problem.head_dim * 4);
  plan.flops = 2.0 * static_cast<double>(problem.batch) * static_cast<double>(problem.query_heads) *
               static_cast<double>(problem.probes) * static_cast<double>(problem.tokens) *
               static_cast<double>(problem.head_dim);
  return plan;
}

std::string ProbeScoresPlan::describe() const {
  return join("probe_scores over ATen: ", blocks, " blocks of ", heads_per_block, " heads x ", probes_per_block,
              " probes in ", head_tasks, " tasks, ", workspace_bytes, " bytes of workspace, ", flops, " FLOPs");
}

}  // namespace zipvl::plan
