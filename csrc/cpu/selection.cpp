// Which tokens: the probes (ZipVL Sec. A), how many tokens matter and which (Sec. 3), and their keys and values moved
// to the front, which is what `drop` keeps as the cache (Algorithm 1).
#include <algorithm>
#include <limits>
#include <vector>

#include "common/probe_draw.h"
#include "cpu/cpu.h"
#include "cpu/tokens.h"
#include "ops/aten.h"

namespace zipvl::cpu {

using namespace aten;

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

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Counts of tokens are float64 here: exact, and what `plus` takes.
constexpr ScalarType kCount = ScalarType::Double;

// p [B, 1]: the fewest real tokens whose largest scores reach tau of the row's sum; all where that is negative, since a
// share of it is no bound.
Tensor budget_by_mass(const Tensor& score, const Tensor& real_count, double tau) {
  if (tau >= 1.0) {
    return real_count;
  }
  const Tensor mass = cumsum(std::get<0>(sort(score, 1, /*descending=*/true)), 1, ScalarType::Double);
  const Tensor total = slice(mass, 1, mass.size(1) - 1, 1);
  const Tensor short_of = less(mass, multiply(total, scalar(tau, ScalarType::Double)));
  const Tensor p = minimum(plus(sum(short_of, 1, true, kCount), scalar(1.0, kCount)), real_count);
  return where(less(total, scalar(0.0, ScalarType::Double)), real_count, p);
}

Tensor budget_by_ratio(const Tensor& real_count, double ratio) {
  return ceil(multiply(real_count, scalar(ratio, kCount)));
}

// [B, 1] bool: rows whose scores cannot be trusted, because one is not finite or because they sum to 0.
Tensor unusable(const Tensor& score) {
  const Tensor total = sum(score, 1, true, ScalarType::Double);
  return logical_or(logical_not(all(isfinite(score), 1, true)), equal(total, scalar(0.0, ScalarType::Double)));
}

// [B, N] int64: each token's position.
Tensor positions_like(const Tensor& row) {
  const Tensor positions = iota(row.size(1), ScalarType::Long, row.device());
  return expand(unsqueeze(positions, 0), {row.size(0), row.size(1)});
}

// selected [B, N] bool -> [B, N] int32: the positions of its tokens, ascending, and N in the places that are left.
Tensor indices(const Tensor& selected) {
  const Tensor none = scalar(static_cast<double>(selected.size(1)), ScalarType::Long, selected.device());
  const Tensor places = where(selected, positions_like(selected), none);
  return to(std::get<0>(sort(places, 1, /*descending=*/false)), ScalarType::Int);
}

// x [H, N, D], position [n] -> rows 0..n of target [H, N, D]
void pack_rows(const Tensor& x, const Tensor& position, const Tensor& target) {
  copy_into(slice(target, 1, 0, position.size(0)), take_rows(x, position));
}

}  // namespace

Tensor probe_index(const ops::ProbeIndexArgs& args) {
  const auto& [q, num_recent, num_random, seed, token_mask, k] = args;
  const std::int64_t batch = q.size(0), tokens = q.size(2);
  const std::int64_t probes = num_recent + num_random;
  const Tensor out = empty({batch, probes}, ScalarType::Int, q.device());
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

TensorPair select_tokens(const ops::SelectTokensArgs& args) {
  const auto& [budget_score, rank_score, tau, ratio, min_tokens, keep_mask, token_mask, local_window, num_sinks,
               extra_mask, max_ratio] = args;
  const std::int64_t batch = budget_score.size(0), tokens = budget_score.size(1);
  const auto device = budget_score.device();
  const Tensor real = real_tokens(token_mask, batch, tokens, device);
  const Tensor real_count = sum(real, 1, true, kCount);
  const Tensor zero = scalar(0.0, ScalarType::Float, device);
  const Tensor budget = where(real, budget_score, zero);
  const Tensor bad = logical_or(unusable(budget), unusable(where(real, rank_score, zero)));

  Tensor target = ratio ? budget_by_ratio(real_count, *ratio) : budget_by_mass(budget, real_count, tau);
  if (max_ratio < 1.0) {
    target = minimum(target, budget_by_ratio(real_count, max_ratio));
  }
  Tensor key = where(real, rank_score, scalar(-kInfinity, ScalarType::Float, device));
  if (keep_mask) {
    const Tensor kept = logical_and(*keep_mask, real);
    key = where(kept, scalar(kInfinity, ScalarType::Float, device), key);
    target = maximum(target, sum(kept, 1, true, kCount));
  }
  target = minimum(maximum(target, scalar(static_cast<double>(min_tokens), kCount)), real_count);

  const Tensor order = std::get<1>(sort(key, 1, /*descending=*/true));
  const Tensor positions = positions_like(real);
  const Tensor chosen = scatter(zeros({batch, tokens}, ScalarType::Bool, device), 1, order, less(positions, target));
  Tensor selected = where(bad, real, chosen);
  if (num_sinks > 0) {
    selected = logical_or(selected, first_real_tokens(real, num_sinks));
  }
  if (local_window > 0) {
    selected = logical_or(selected, last_real_tokens(real, local_window));
  }
  if (extra_mask) {
    selected = logical_or(selected, logical_and(real, *extra_mask));
  }

  return {indices(selected), sum(selected, 1, false, ScalarType::Int)};
}

TensorPair pack_kv(const ops::PackKvArgs& args) {
  const auto& [k, v, index, count] = args;
  const std::int64_t batch = k.size(0), tokens = k.size(2);
  const Sizes sizes{batch, k.size(1), tokens, k.size(3)};
  const Tensor k_packed = empty(sizes, k.scalar_type(), k.device());
  const Tensor v_packed = empty(sizes, v.scalar_type(), v.device());
  const Tensor first = scalar(0, ScalarType::Long);
  const Tensor last = scalar(static_cast<double>(tokens - 1), ScalarType::Long);
  const Tensor inside = minimum(maximum(to(index, ScalarType::Long), first), last);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t places = host_may_read(k) ? host_count(count, b, tokens) : tokens;
    const Tensor position = slice(select(inside, 0, b), 0, 0, places);
    pack_rows(select(k, 0, b), position, select(k_packed, 0, b));
    pack_rows(select(v, 0, b), position, select(v_packed, 0, b));
  }
  return {k_packed, v_packed};
}

}  // namespace zipvl::cpu
