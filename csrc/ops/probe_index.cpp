#include "cpu/probe_index.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {

Tensor probe_index(const Tensor& q, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                   const std::optional<Tensor>& token_mask) {
  checks::probe_index("probe_index", q, num_recent, num_random, seed, token_mask);
  return cpu::probe_index(q.size(0), q.size(2), num_recent, num_random, seed, token_mask);
}

}  // namespace zipvl::ops
