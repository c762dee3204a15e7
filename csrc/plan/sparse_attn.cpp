#include "plan/sparse_attn.h"

#include <algorithm>
#include <sstream>

namespace zipvl::plan {
namespace {

// A bool mask of 2**24 entries is 16 MiB; ATen widens it to the scores' dtype, so 64 MiB at most in float32.
constexpr std::int64_t kMaskEntries = std::int64_t{1} << 24;
// Under causal a block of rows needs only the keys up to its last row: shorter blocks skip more of the triangle, longer
// ones cost fewer calls.
constexpr std::int64_t kMostRows = 512;

}  // namespace

SparseAttnPlan plan_sparse_attn(const SparseAttnProblem& problem) {
  SparseAttnPlan plan{};
  plan.masked = !problem.count_on_host || (problem.all_queries && problem.causal);
  const std::int64_t keys = std::max<std::int64_t>(1, problem.keys);
  plan.rows_per_block = std::clamp<std::int64_t>(kMaskEntries / keys, 1, kMostRows);
  plan.mask_bytes = plan.masked ? plan.rows_per_block * keys : 0;
  const double rows = static_cast<double>(problem.all_queries ? problem.tokens : problem.keys);
  const double pairs = rows * static_cast<double>(problem.keys) * (problem.causal ? 0.5 : 1.0);
  plan.flops = 4.0 * static_cast<double>(problem.batch) * static_cast<double>(problem.query_heads) *
               static_cast<double>(problem.head_dim) * pairs;
  return plan;
}

std::string SparseAttnPlan::describe() const {
  std::ostringstream text;
  text << "sparse_attn over ATen: ";
  if (masked) {
    text << "masked blocks of " << rows_per_block << " rows (" << mask_bytes << " bytes of mask), ";
  } else {
    text << "one product among the selected tokens, ";
  }
  text << flops << " FLOPs";
  return text.str();
}

}  // namespace zipvl::plan
