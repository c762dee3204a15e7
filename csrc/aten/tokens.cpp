// Small facts about tokens that several ops share.
#include <algorithm>

#include "aten/call.h"
#include "aten/kernels.h"

namespace zipvl::aten {

Tensor real_tokens(const std::optional<Tensor>& token_mask, std::int64_t batch, std::int64_t tokens, Device device) {
  return token_mask ? *token_mask : full({batch, tokens}, 1.0, ScalarType::Bool, device);
}

Tensor last_real_tokens(const Tensor& real, std::int64_t most) {
  // A real token is among the last `most` when at least `real - most` real tokens stand before it.
  const Tensor rank = cumsum(real, 1, ScalarType::Double);
  const Tensor total = slice(rank, 1, real.size(1) - 1, 1);
  const Tensor first = minus(total, scalar(static_cast<double>(most), ScalarType::Double));
  return logical_and(real, less(first, rank));
}

std::int64_t host_count(const Tensor& counts, std::int64_t i, std::int64_t most) {
  const std::int64_t value = counts.const_data_ptr<std::int32_t>()[i * counts.stride(0)];
  return std::clamp<std::int64_t>(value, 0, most);
}

}  // namespace zipvl::aten
