// How many tokens (layer-wise adaptive ratio) and which (token identification): ZipVL Sec. 3.
#include <limits>

#include "cpu/kernels.h"
#include "ops/aten.h"

namespace zipvl::aten {
namespace {

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

}  // namespace

std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask) {
  const std::int64_t batch = budget_score.size(0), tokens = budget_score.size(1);
  const auto device = budget_score.device();
  const Tensor real = real_tokens(token_mask, batch, tokens, device);
  const Tensor real_count = sum(real, 1, true, kCount);
  const Tensor zero = scalar(0.0, ScalarType::Float, device);
  const Tensor budget = where(real, budget_score, zero);
  const Tensor bad = logical_or(unusable(budget), unusable(where(real, rank_score, zero)));

  Tensor target = ratio ? budget_by_ratio(real_count, *ratio) : budget_by_mass(budget, real_count, tau);
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
  const Tensor selected = where(bad, real, chosen);

  return {indices(selected), sum(selected, 1, false, ScalarType::Int)};
}

std::tuple<Tensor, Tensor> widen_selection(const Tensor& index, const Tensor& count, double dense_above,
                                           const std::optional<Tensor>& token_mask) {
  const Tensor real = real_tokens(token_mask, index.size(0), index.size(1), index.device());
  const Tensor limit = multiply(sum(real, 1, false, kCount), scalar(dense_above, kCount));
  const Tensor wide = less(limit, to(count, kCount));
  return {where(unsqueeze(wide, 1), indices(real), index), where(wide, sum(real, 1, false, ScalarType::Int), count)};
}

}  // namespace zipvl::aten
