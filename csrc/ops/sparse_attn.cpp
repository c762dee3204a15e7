#include <algorithm>

#include "cpu/host_reads.h"
#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::ops {
namespace {

// The most selected tokens any row can have, as far as the host knows without asking the device.
std::int64_t max_keys(const Tensor& count, std::int64_t tokens) {
  if (!aten::host_may_read(count)) {
    return tokens;
  }
  std::int64_t most = 0;
  for (std::int64_t b = 0; b < count.size(0); ++b) {
    most = std::max(most, aten::host_count(count, b, tokens));
  }
  return most;
}

}  // namespace

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   std::optional<double> scale, bool causal, bool all_queries) {
  constexpr const char* kOp = "sparse_attn";
  const auto sizes = checks::sparse_attn(kOp, q, k, v, index, count, scale);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    const aten::Sizes shape{sizes.batch, sizes.tokens, sizes.query_heads, sizes.head_dim};
    return aten::transpose(aten::empty(shape, q.scalar_type(), q.device()), 1, 2);
  }
  const auto plan = plan::plan_sparse_attn({sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens,
                                            sizes.head_dim, max_keys(count, sizes.tokens), causal, all_queries,
                                            aten::host_may_read(q), host_threads(q)});
  return aten::sparse_attn(q, k, v, index, count, scale_or_default(scale, sizes.head_dim), plan, causal, all_queries);
}

}  // namespace zipvl::ops
