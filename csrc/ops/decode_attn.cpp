#include <limits>

#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::ops {

std::tuple<Tensor, Tensor> decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& lengths, std::optional<double> scale) {
  constexpr const char* kOp = "decode_attn";
  const auto sizes = checks::decode_attn(kOp, q, k_cache, v_cache, lengths, scale);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    const auto lse = aten::full({sizes.batch, sizes.query_heads, 1}, -std::numeric_limits<double>::infinity(),
                                aten::ScalarType::Float, q.device());
    const aten::Sizes shape{sizes.batch, 1, sizes.query_heads, sizes.head_dim};
    return {aten::transpose(aten::zeros(shape, q.scalar_type(), q.device()), 1, 2), lse};
  }
  return aten::decode_attn(q, k_cache, v_cache, lengths, scale_or_default(scale, sizes.head_dim));
}

}  // namespace zipvl::ops
