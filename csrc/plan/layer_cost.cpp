#include "plan/layer_cost.h"

#include "common/text.h"

namespace zipvl::plan {
namespace {

// us on an NVIDIA H200, bfloat16: of a call, of each 1e9 numbers of q, and of each 1e9 of those times the tokens.
// `python -m benchmarks.layer_cost` fits them to benchmarks/results/layer.jsonl.
constexpr double kDense = 5.47, kDensePerToken = 2536, kDensePerPair = 3.398;
constexpr double kZipvlByTau = 4.906;
constexpr double kZipvl = 24.47, kZipvlPerToken = 1739, kZipvlPerPair = 3.377;

constexpr std::int64_t kGranule = 64, kMaxTokens = std::int64_t{1} << 17;  // lengths that are asked about

}  // namespace

LayerCost plan_layer_cost(const LayerCostProblem& problem) {
  const double tokens = static_cast<double>(problem.tokens);
  const double per_token = 1e-9 * static_cast<double>(problem.batch * problem.query_heads * problem.head_dim) * tokens;
  const double pairs = per_token * tokens;
  const double seen = problem.share * (problem.all_queries ? 1.0 : problem.share);
  LayerCost cost{};
  cost.dense_us = kDense + kDensePerToken * per_token + kDensePerPair * pairs;
  cost.zipvl_us =
      (problem.by_tau ? kZipvlByTau : 0.0) + kZipvl + kZipvlPerToken * per_token + kZipvlPerPair * pairs * seen;
  return cost;
}

std::int64_t plan_dense_below(const DenseBelowProblem& problem) {
  const auto pays = [&](std::int64_t tokens) {
    const LayerCost cost = plan_layer_cost(
        {1, problem.query_heads, tokens, problem.head_dim, problem.share, problem.by_tau, problem.all_queries});
    return cost.zipvl_us <= (problem.by_tau ? kMaxFactor * cost.dense_us + kMaxExtraUs : cost.dense_us);
  };
  if (!pays(kMaxTokens)) {
    return kNeverPays;
  }
  std::int64_t tokens = kMaxTokens;
  while (tokens > kGranule && pays(tokens - kGranule)) {
    tokens -= kGranule;
  }
  return tokens;
}

std::string LayerCost::describe() const { return join("dense ", dense_us, " us, ZipVL ", zipvl_us, " us"); }

}  // namespace zipvl::plan
