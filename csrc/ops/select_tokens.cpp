#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {

std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask) {
  checks::select_tokens("select_tokens", budget_score, rank_score, tau, ratio, min_tokens, keep_mask, token_mask);
  const std::int64_t batch = budget_score.size(0), tokens = budget_score.size(1);
  if (batch == 0 || tokens == 0) {
    return {aten::zeros({batch, tokens}, aten::ScalarType::Int, budget_score.device()),
            aten::zeros({batch}, aten::ScalarType::Int, budget_score.device())};
  }
  return aten::select_tokens(budget_score, rank_score, tau, ratio, min_tokens, keep_mask, token_mask);
}

}  // namespace zipvl::ops
