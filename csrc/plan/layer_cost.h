// What a layer costs, dense and by ZipVL, from shapes alone: whether ZipVL can pay. Fitted to times measured on one GPU
// (layer_cost.cpp); a decision needs their ratio, which other GPUs change less than the times.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

struct LayerCostProblem {
  std::int64_t batch, query_heads, tokens, head_dim;
  double share;  // of the tokens that are selected, in [0, 1]; 1 is the worst case
  bool by_tau;   // how many are selected is found by tau, which takes longer than a ratio
  bool all_queries;
};

struct LayerCost {
  double dense_us;  // causal dense attention
  double zipvl_us;  // zipvl_attn

  std::string describe() const;
};

LayerCost plan_layer_cost(const LayerCostProblem& problem);

struct DenseBelowProblem {
  std::int64_t query_heads, head_dim;
  double
      share;  // the ratio; or tau, which bounds the share: the largest of N scores hold at least their share of the sum
  bool by_tau;
  bool all_queries;
};

// The fewest tokens from which on ZipVL pays for one batch row. With a ratio that is where it is faster than dense
// attention. With tau it is where even the largest selection, that of equal scores, costs at most kMaxFactor times
// dense attention and kMaxExtraUs.
std::int64_t plan_dense_below(const DenseBelowProblem& problem);

constexpr double kMaxFactor = 1.03, kMaxExtraUs = 10.0;
constexpr std::int64_t kNeverPays = std::int64_t{1} << 21;  // more tokens than the kernels take

}  // namespace zipvl::plan
