#include "cpu/probe_index.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/probe_draw.h"

namespace zipvl::cpu {
namespace {

// Positions of row b's real tokens, ascending.
std::vector<std::int32_t> real_positions(const Tensor& token_mask, std::int64_t b, std::int64_t tokens) {
  const bool* row = token_mask.const_data_ptr<bool>() + b * token_mask.stride(0);
  std::vector<std::int32_t> positions;
  for (std::int64_t n = 0; n < tokens; ++n) {
    if (row[n * token_mask.stride(1)]) {
      positions.push_back(static_cast<std::int32_t>(n));
    }
  }
  return positions;
}

}  // namespace

Tensor probe_index(std::int64_t batch, std::int64_t tokens, std::int64_t num_recent, std::int64_t num_random,
                   std::int64_t seed, const std::optional<Tensor>& token_mask) {
  const std::int64_t probes = num_recent + num_random;
  const Tensor out = torch::stable::empty(std::vector<std::int64_t>{batch, probes}, torch::headeronly::ScalarType::Int);
  std::int32_t* row = out.mutable_data_ptr<std::int32_t>();
  for (std::int64_t b = 0; b < batch; ++b, row += probes) {
    std::vector<std::int32_t> positions;
    if (token_mask) {
      positions = real_positions(*token_mask, b, tokens);
    }
    const std::int64_t real = token_mask ? static_cast<std::int64_t>(positions.size()) : tokens;
    const ProbeSplit split = split_probes(real, num_recent, num_random);
    const std::int64_t count = split.random + split.recent;
    for (std::int64_t slot = 0; slot < count; ++slot) {
      const std::int64_t rank = probe_rank(split, static_cast<std::uint64_t>(seed), num_random, slot);
      row[slot] = token_mask ? positions[static_cast<std::size_t>(rank)] : static_cast<std::int32_t>(rank);
    }
    std::fill(row + count, row + probes, -1);
  }
  return out;
}

}  // namespace zipvl::cpu
