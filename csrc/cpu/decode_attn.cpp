// One query a row against the first `lengths` slots of its cache, with the log-sum-exp that merges partial results.
#include <limits>

#include "cpu/cpu.h"
#include "cpu/tokens.h"
#include "ops/aten.h"

namespace zipvl::cpu {

using namespace aten;

TensorPair decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
                       double scale) {
  const std::int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(3);
  const std::int64_t kv_heads = k_cache.size(1), slots = k_cache.size(2), group = heads / kv_heads;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Tensor out = zeros({batch, 1, heads, head_dim}, q.scalar_type(), q.device());
  const Tensor lse = full({batch, heads, 1}, -kInfinity, ScalarType::Float, q.device());
  const Tensor factor = scalar(scale, ScalarType::Float);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t seen = host_may_read(q) ? host_count(lengths, b, slots) : slots;
    if (seen == 0) {
      continue;
    }
    Tensor k = select(k_cache, 0, b), v = select(v_cache, 0, b);
    k = to(slice(k, 1, 0, seen), ScalarType::Float);
    v = to(slice(v, 1, 0, seen), ScalarType::Float);
    const Tensor rows = multiply(to(reshape(select(q, 0, b), {kv_heads, group, head_dim}), ScalarType::Float), factor);
    const Tensor scores = matmul(rows, transpose(k, 1, 2));
    if (!host_may_read(q)) {
      const Tensor hidden =
          less_equal(to(select(lengths, 0, b), ScalarType::Long), iota(seen, ScalarType::Long, q.device()));
      masked_fill_(scores, hidden, -kInfinity);
      const Tensor zero = scalar(0.0, ScalarType::Float, q.device());
      v = where(unsqueeze(unsqueeze(hidden, 0), 2), zero, v);
    }
    Tensor weights = softmax(scores, 2);
    if (!host_may_read(q)) {
      const Tensor none = less_equal(select(lengths, 0, b), scalar(0, ScalarType::Int));
      masked_fill_(weights, none, 0.0);
    }
    copy_into(select(out, 0, b), reshape(matmul(weights, v), {1, heads, head_dim}));
    copy_into(select(lse, 0, b), reshape(logsumexp(scores, 2), {heads, 1}));
  }
  return {transpose(out, 1, 2), lse};
}

}  // namespace zipvl::cpu
