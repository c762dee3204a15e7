#include "cpu/sparse_attn_plan.h"

#include <algorithm>

#include "common/text.h"
#include "cpu/head_tasks_plan.h"

namespace zipvl::plan {
namespace {

// On the CPU 2**21 float32 scores are 8 MiB, which its cache holds between the product, the softmax and the second
// product. On another device a block is mostly launches, so it is larger: 64 MiB.
constexpr std::int64_t kHostScores = std::int64_t{1} << 21;
constexpr std::int64_t kDeviceScores = std::int64_t{1} << 24;
// Under causal a block of n queries computes n**2 / 2 scores that are then hidden. Measured at 1,024 keys, 28/4 heads
// on two cores: 38 ms with 32 or 64 queries a block, 59 with 128, 80 with 256; one fused causal call takes 46.
constexpr std::int64_t kMaxHostRows = 64;
constexpr std::int64_t kMaxDeviceRows = 512;
// A block holds its scores and their softmax in float32; the mask is one byte a query and key, for all heads.
constexpr std::int64_t kBytesPerScore = 8;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

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

std::string SparseAttnPlan::describe() const {
  return join("sparse_attn over ATen: ", blocks, " blocks of ", rows_per_block, " queries a batch row in ", head_tasks,
              " tasks, ", workspace_bytes, " bytes of workspace, ", flops, " FLOPs");
}

}  // namespace zipvl::plan
