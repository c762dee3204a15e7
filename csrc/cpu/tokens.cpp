// Small facts about tokens that several ops share.
#include <algorithm>
#include <vector>

#include "cpu/tokens.h"
#include "ops/aten.h"

namespace zipvl::cpu {

using namespace aten;
namespace {

Positions host_positions(const Tensor& row, std::int64_t count, std::int64_t tokens, std::int64_t first) {
  const std::int32_t* entries = row.const_data_ptr<std::int32_t>();
  std::vector<std::int64_t> kept;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t position = entries[i * row.stride(0)];
    if (position >= first && position < tokens) {
      kept.push_back(position);
    }
  }
  return {long_tensor(kept), std::nullopt};
}

}  // namespace

Tensor long_tensor(const std::vector<std::int64_t>& values) {
  const Tensor tensor =
      empty({static_cast<std::int64_t>(values.size())}, ScalarType::Long, Device(torch::headeronly::DeviceType::CPU));
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<std::int64_t>());
  return tensor;
}

Positions positions_of(const Tensor& row, const std::optional<Tensor>& count, std::int64_t tokens, std::int64_t first) {
  const std::int64_t places = row.size(0);
  if (host_may_read(row)) {
    return host_positions(row, count ? host_count(unsqueeze(*count, 0), 0, places) : places, tokens, first);
  }
  const Tensor wide = to(row, ScalarType::Long);
  const Tensor least = scalar(static_cast<double>(first), ScalarType::Long, row.device());
  const Tensor last = scalar(static_cast<double>(tokens - 1), ScalarType::Long);
  Tensor valid = logical_and(less_equal(least, wide), less_equal(wide, last));
  if (count) {
    valid = logical_and(valid, less(iota(places, ScalarType::Long, row.device()), to(*count, ScalarType::Long)));
  }
  return {where(valid, wide, least), valid};
}

Tensor row_ends(const Tensor& last_key, std::int64_t tokens) {
  const Tensor last = scalar(static_cast<double>(tokens - 1), ScalarType::Long);
  return minimum(maximum(to(last_key, ScalarType::Long), scalar(-1, ScalarType::Long)), last);
}

Tensor real_tokens(const std::optional<Tensor>& token_mask, std::int64_t batch, std::int64_t tokens, Device device) {
  return token_mask ? *token_mask : full({batch, tokens}, 1.0, ScalarType::Bool, device);
}

Tensor first_real_tokens(const Tensor& real, std::int64_t max) {
  const Tensor rank = cumsum(real, 1, ScalarType::Double);
  return logical_and(real, less_equal(rank, scalar(static_cast<double>(max), ScalarType::Double)));
}

Tensor last_real_tokens(const Tensor& real, std::int64_t max) {
  // A real token is among the last `max` when at least `real - max` real tokens stand before it.
  const Tensor rank = cumsum(real, 1, ScalarType::Double);
  const Tensor total = slice(rank, 1, real.size(1) - 1, 1);
  const Tensor first = minus(total, scalar(static_cast<double>(max), ScalarType::Double));
  return logical_and(real, less(first, rank));
}

std::int64_t host_count(const Tensor& counts, std::int64_t i, std::int64_t max) {
  const std::int64_t value = counts.const_data_ptr<std::int32_t>()[i * counts.stride(0)];
  return std::clamp<std::int64_t>(value, 0, max);
}

}  // namespace zipvl::cpu
