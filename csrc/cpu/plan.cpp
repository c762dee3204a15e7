#include "cpu/plan.h"

#include <algorithm>

#include "common/math.h"
#include "common/text.h"

namespace zipvl::plan {
namespace {

// 2**20 float32 scores are 4 MiB: enough rows to keep a matrix product busy, and the passes over a block (mask,
// softmax, sum) find it in the cache.
constexpr std::int64_t kScoresPerBlock = std::int64_t{1} << 20;
// Probes go up in position, and a block computes only the columns up to its last probe: short blocks skip more of what
// causal hides, and 16 probes of a group's heads are rows enough for a matrix product.
constexpr std::int64_t kMaxProbes = 16;
// A block holds its scores, their softmax and a mask, of 4, 4 and 1 bytes; K of one head as float32 stands beside them.
constexpr std::int64_t kProbeBytesPerScore = 9;

// On the CPU 2**21 float32 scores are 8 MiB, which its cache holds between the product, the softmax and the second
// product. On another device a block is mostly launches, so it is larger: 64 MiB.
constexpr std::int64_t kHostScores = std::int64_t{1} << 21;
constexpr std::int64_t kDeviceScores = std::int64_t{1} << 24;
// Under causal a block of n queries computes n**2 / 2 scores that are then hidden. Measured at 1,024 keys, 28/4 heads
// on two cores: 38 ms with 32 or 64 queries a block, 59 with 128, 80 with 256; one fused causal call takes 46.
constexpr std::int64_t kMaxHostRows = 64;
constexpr std::int64_t kMaxDeviceRows = 512;
// With a window a thread has a block of its own, so of half the size. The rows of a block are seen to by one slice of
// keys: rows far apart would compute many scores that are then hidden.
constexpr std::int64_t kWindowScores = std::int64_t{1} << 20;
constexpr std::int64_t kMaxWindowSpan = 256;
// A block holds its scores and their softmax in float32; the mask is one byte a query and key, for all heads.
constexpr std::int64_t kBytesPerScore = 8;

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
                         (block_scores * kProbeBytesPerScore + problem.tokens * problem.head_dim * 4);
  plan.flops = 2.0 * static_cast<double>(problem.batch) * static_cast<double>(problem.query_heads) *
               static_cast<double>(problem.probes) * static_cast<double>(problem.tokens) *
               static_cast<double>(problem.head_dim);
  return plan;
}

std::string ProbeScoresPlan::describe() const {
  return join("probe_scores over ATen: ", blocks, " blocks of ", heads_per_block, " heads x ", probes_per_block,
              " probes in ", head_tasks, " tasks, ", workspace_bytes, " bytes of workspace, ", flops, " FLOPs");
}

SparseAttnPlan plan_sparse_attn(const SparseAttnProblem& problem) {
  SparseAttnPlan plan{};
  const std::int64_t keys = std::max<std::int64_t>(1, problem.keys);
  const std::int64_t scores = problem.count_on_host ? kHostScores : kDeviceScores;
  const std::int64_t most = problem.count_on_host ? kMaxHostRows : kMaxDeviceRows;
  plan.rows_per_block = std::clamp<std::int64_t>(scores / (problem.query_heads * keys), 1, most);
  plan.head_tasks = head_tasks(problem.kv_heads, problem.threads);
  const std::int64_t queries = problem.all_queries ? problem.tokens : problem.keys;
  plan.blocks = ceil_div(queries, plan.rows_per_block);
  plan.workspace_bytes = plan.rows_per_block * keys * (problem.query_heads * kBytesPerScore + 1) +
                         2 * 4 * keys * problem.kv_heads * problem.head_dim;
  const double pairs = static_cast<double>(queries) * static_cast<double>(problem.keys) * (problem.causal ? 0.5 : 1.0);
  plan.flops = 4.0 * static_cast<double>(problem.batch) * static_cast<double>(problem.query_heads) *
               static_cast<double>(problem.head_dim) * pairs;
  return plan;
}

WindowAttnPlan plan_window_attn(std::int64_t query_heads, std::int64_t window, std::int64_t keys) {
  const std::int64_t columns = keys + window + kMaxWindowSpan;
  const std::int64_t rows = std::clamp<std::int64_t>(kWindowScores / (query_heads * columns), 1, kMaxHostRows);
  return {rows, kMaxWindowSpan};
}

std::string SparseAttnPlan::describe() const {
  return join("sparse_attn over ATen: ", blocks, " blocks of ", rows_per_block, " queries a batch row in ", head_tasks,
              " tasks, ", workspace_bytes, " bytes of workspace, ", flops, " FLOPs");
}

}  // namespace zipvl::plan
