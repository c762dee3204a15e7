#include "cuda/ops/ops.h"
#include "ops/ops.h"

namespace zipvl::cuda {

std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask) {
  return ops::select_tokens(budget_score, rank_score, tau, ratio, min_tokens, keep_mask, token_mask);
}

}  // namespace zipvl::cuda
