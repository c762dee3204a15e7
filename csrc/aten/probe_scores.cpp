// Probe scores (ZipVL Eq. A): softmax rows of the probes alone, summed over heads and probes into one score per token.
#include <algorithm>
#include <limits>
#include <vector>

#include "aten/call.h"
#include "aten/kernels.h"

namespace zipvl::aten {
namespace {

// The probes of one batch row.
struct Probes {
  Tensor position;              // [P] int64, inside [0, N)
  std::optional<Tensor> valid;  // [P] bool; absent when all are
};

Probes probes_of(const Tensor& probe_index, std::int64_t b, std::int64_t tokens) {
  const Tensor row = select(probe_index, 0, b);
  if (probe_index.is_cpu()) {
    std::vector<std::int64_t> kept;
    const std::int32_t* entries = row.const_data_ptr<std::int32_t>();
    for (std::int64_t i = 0; i < row.size(0); ++i) {
      const std::int64_t position = entries[i * row.stride(0)];
      if (position >= 0 && position < tokens) {
        kept.push_back(position);
      }
    }
    const Tensor position = empty({static_cast<std::int64_t>(kept.size())}, ScalarType::Long, row.device());
    std::copy(kept.begin(), kept.end(), position.mutable_data_ptr<std::int64_t>());
    return {position, std::nullopt};
  }
  const Tensor wide = to(row, ScalarType::Long);
  const Tensor first = scalar(0, ScalarType::Long);
  const Tensor last = scalar(static_cast<double>(tokens - 1), ScalarType::Long);
  const Tensor valid = logical_and(less_equal(first, wide), less_equal(wide, last));
  return {where(valid, wide, first), valid};
}

// [P, N] bool: which tokens each probe may attend to.
Tensor visible(const Probes& probes, const Tensor& real, const Tensor& positions, bool causal) {
  const std::int64_t count = probes.position.size(0);
  Tensor allowed = expand(unsqueeze(real, 0), {count, real.size(0)});
  if (causal) {
    allowed = logical_and(allowed, less_equal(unsqueeze(positions, 0), unsqueeze(probes.position, 1)));
  }
  if (probes.valid) {
    allowed = logical_and(allowed, unsqueeze(*probes.valid, 1));
  }
  return allowed;
}

// The probes that see no token [1, p, 1], whose softmax row is 0 / 0; absent where the host knows that all see some.
std::optional<Tensor> blind_probes(const Tensor& hidden) {
  const Tensor blind = all(hidden, 1, /*keepdim=*/true);
  if (hidden.is_cpu() && !*any(blind, 0, false).const_data_ptr<bool>()) {
    return std::nullopt;
  }
  return unsqueeze(blind, 0);
}

// q [h, p, D], k_transposed [D, N], hidden [p, N] bool -> the sum over heads and probes of softmax(scale q k) [N]
Tensor column_sums(const Tensor& q, const Tensor& k_transposed, const Tensor& hidden,
                   const std::optional<Tensor>& blind, const Tensor& scale) {
  const std::int64_t heads = q.size(0), probes = q.size(1), tokens = k_transposed.size(1);
  Tensor scores =
      reshape(matmul(reshape(multiply(q, scale), {heads * probes, q.size(2)}), k_transposed), {heads, probes, tokens});
  masked_fill_(scores, unsqueeze(hidden, 0), -std::numeric_limits<double>::infinity());
  scores = softmax(scores, 2);
  if (blind) {
    masked_fill_(scores, *blind, 0.0);
  }
  return sum(reshape(scores, {heads * probes, tokens}), 0, /*keepdim=*/false);
}

}  // namespace

std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index, double scale,
                                        bool causal, const std::optional<Tensor>& token_mask,
                                        const plan::ProbeScoresPlan& plan) {
  const std::int64_t batch = q.size(0), query_heads = q.size(1), tokens = q.size(2);
  const std::int64_t kv_heads = k.size(1), group = query_heads / kv_heads;
  const Tensor real = real_tokens(token_mask, batch, tokens, q.device());
  const Tensor positions = iota(tokens, ScalarType::Long, q.device());
  const Tensor factor = scalar(scale, ScalarType::Float);
  const Tensor accumulated = zeros({batch, tokens}, ScalarType::Float, q.device());
  const Tensor normalized = zeros({batch, tokens}, ScalarType::Float, q.device());

  for (std::int64_t b = 0; b < batch; ++b) {
    const Probes probes = probes_of(probe_index, b, tokens);
    const std::int64_t count = probes.position.size(0);
    const Tensor real_row = select(real, 0, b);
    Tensor total = zeros({tokens}, ScalarType::Float, q.device());
    Tensor viewers = zeros({tokens}, ScalarType::Float, q.device());
    for (std::int64_t p = 0; p < count; p += plan.probes_per_block) {
      const std::int64_t rows = std::min(plan.probes_per_block, count - p);
      Probes block{slice(probes.position, 0, p, rows), std::nullopt};
      if (probes.valid) {
        block.valid = slice(*probes.valid, 0, p, rows);
      }
      const Tensor allowed = visible(block, real_row, positions, causal);
      const Tensor hidden = logical_not(allowed);
      const std::optional<Tensor> blind = blind_probes(hidden);
      viewers = plus(viewers, sum(allowed, 0, false, ScalarType::Float));
      for (std::int64_t g = 0; g < kv_heads; ++g) {
        const Tensor k_transposed = transpose(to(select(select(k, 0, b), 0, g), ScalarType::Float), 0, 1);
        for (std::int64_t h = 0; h < group; h += plan.heads_per_block) {
          const Tensor heads = slice(select(q, 0, b), 0, g * group + h, std::min(plan.heads_per_block, group - h));
          const Tensor q_block = to(take_rows(heads, block.position), ScalarType::Float);
          total = plus(total, column_sums(q_block, k_transposed, hidden, blind, factor));
        }
      }
    }
    total = divide(total, scalar(static_cast<double>(query_heads), ScalarType::Float));
    // Where no probe may look the total is 0, and so is 0 / 1.
    const Tensor mean = divide(total, maximum(viewers, scalar(1.0, ScalarType::Float)));
    copy_into(select(accumulated, 0, b), total);
    copy_into(select(normalized, 0, b), mean);
  }
  return {accumulated, normalized};
}

}  // namespace zipvl::aten
