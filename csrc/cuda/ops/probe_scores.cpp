#include "cuda/ops/ops.h"
#include "ops/ops.h"

namespace zipvl::cuda {

std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index,
                                        std::optional<double> scale, bool causal,
                                        const std::optional<Tensor>& token_mask) {
  return ops::probe_scores(q, k, probe_index, scale, causal, token_mask);
}

}  // namespace zipvl::cuda
