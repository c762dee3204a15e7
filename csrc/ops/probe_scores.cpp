#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::ops {

std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index,
                                        std::optional<double> scale, bool causal,
                                        const std::optional<Tensor>& token_mask) {
  const auto sizes = checks::probe_scores("probe_scores", q, k, probe_index, scale, token_mask);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    const aten::Sizes shape{sizes.batch, sizes.tokens};
    return {aten::zeros(shape, aten::ScalarType::Float, q.device()),
            aten::zeros(shape, aten::ScalarType::Float, q.device())};
  }
  const auto plan = plan::plan_probe_scores({sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens,
                                             probe_index.size(1), sizes.head_dim, host_threads(q)});
  return aten::probe_scores(q, k, probe_index, scale_or_default(scale, sizes.head_dim), causal, token_mask, plan);
}

}  // namespace zipvl::ops
