#include "cuda/ops/ops.h"
#include "ops/ops.h"

namespace zipvl::cuda {

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   std::optional<double> scale, bool causal, bool all_queries) {
  return ops::sparse_attn(q, k, v, index, count, scale, causal, all_queries);
}

}  // namespace zipvl::cuda
