#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {

Tensor project_queries(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cos,
                       const Tensor& sin, const Tensor& index, const std::optional<Tensor>& count,
                       const std::optional<Tensor>& norm_weight, double norm_eps) {
  checks::project_queries("project_queries", x, weight, bias, cos, sin, index, count, norm_weight, norm_eps);
  const std::int64_t batch = x.size(0), tokens = x.size(1), head_dim = cos.size(2);
  if (batch == 0 || tokens == 0) {
    const aten::Sizes shape{batch, tokens, weight.size(0) / head_dim, head_dim};
    return aten::transpose(aten::empty(shape, x.scalar_type(), x.device()), 1, 2);
  }
  return aten::project_queries(x, weight, bias, cos, sin, index, count, norm_weight, norm_eps);
}

}  // namespace zipvl::ops
