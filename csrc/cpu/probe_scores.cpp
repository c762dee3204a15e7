// Probe scores (ZipVL Eq. A): softmax rows of the probes alone, summed over heads and probes into one score per token.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/head_tasks.h"
#include "cpu/plan.h"
#include "cpu/tokens.h"
#include "ops/aten.h"

namespace zipvl::cpu {

using namespace aten;
namespace {

// ends [P]: the last token that each probe sees, its own unless a caller says otherwise.
Columns columns_of(const Positions& probes, const Tensor& ends, std::int64_t tokens, bool causal, bool masked) {
  if (probes.valid || !causal) {
    return {probes.valid || masked ? 0 : tokens, tokens};
  }
  const std::int64_t* end = ends.const_data_ptr<std::int64_t>();
  const auto [first, last] = std::minmax_element(end, end + ends.size(0));
  return {masked ? 0 : *first + 1, *last + 1};
}

// [P, seen - clear] bool: the tokens from `clear` on that each probe may attend to. real [N] bool, positions [N].
Tensor visible(const Positions& probes, const Tensor& ends, const Tensor& real, const Tensor& positions,
               const Columns& columns, bool causal) {
  const std::int64_t width = columns.seen - columns.clear;
  Tensor allowed = expand(unsqueeze(slice(real, 0, columns.clear, width), 0), {probes.position.size(0), width});
  if (causal) {
    const Tensor position = unsqueeze(slice(positions, 0, columns.clear, width), 0);
    allowed = logical_and(allowed, less_equal(position, unsqueeze(ends, 1)));
  }
  if (probes.valid) {
    allowed = logical_and(allowed, unsqueeze(*probes.valid, 1));
  }
  return allowed;
}

// The probes that see no token [1, p, 1], whose softmax row is 0 / 0; absent where the host knows that all see some.
std::optional<Tensor> blind_probes(const Tensor& hidden, const Columns& columns) {
  if (columns.clear > 0) {
    return std::nullopt;
  }
  const Tensor blind = all(hidden, 1, /*keepdim=*/true);
  if (host_may_read(hidden) && !*any(blind, 0, false).const_data_ptr<bool>()) {
    return std::nullopt;
  }
  return unsqueeze(blind, 0);
}

// q [h, p, D], k_transposed [D, seen], hidden [p, seen - clear] bool -> the sum over heads and probes of
// softmax(scale q k) [seen]
Tensor column_sums(const Tensor& q, const Tensor& k_transposed, const Tensor& hidden,
                   const std::optional<Tensor>& blind, const Columns& columns, const Tensor& scale) {
  const std::int64_t heads = q.size(0), probes = q.size(1);
  Tensor scores = reshape(matmul(reshape(multiply(q, scale), {heads * probes, q.size(2)}), k_transposed),
                          {heads, probes, columns.seen});
  if (columns.clear < columns.seen) {
    masked_fill_(slice(scores, 2, columns.clear, columns.seen - columns.clear), unsqueeze(hidden, 0),
                 -std::numeric_limits<double>::infinity());
  }
  scores = softmax(scores, 2);
  if (blind) {
    masked_fill_(scores, *blind, 0.0);
  }
  return sum(reshape(scores, {heads * probes, columns.seen}), 0, /*keepdim=*/false);
}

// total[0 : part] += part
void add_into(const Tensor& total, std::int64_t begin, const Tensor& part) {
  const Tensor target = slice(total, 0, begin, part.size(0));
  copy_into(target, plus(target, part));
}

}  // namespace

TensorPair probe_scores(const ops::ProbeScoresArgs& args) {
  const auto& [q, k, probe_index, scale, causal, token_mask, last_key] = args;
  const std::int64_t batch = q.size(0), query_heads = q.size(1), tokens = k.size(2), first = tokens - q.size(2);
  const std::int64_t kv_heads = k.size(1), group = query_heads / kv_heads;
  const Tensor real = real_tokens(token_mask, batch, tokens, q.device());
  const Tensor positions = iota(tokens, ScalarType::Long, q.device());
  const Tensor factor = scalar(ops::scale_or_default(scale, q.size(3)), ScalarType::Float);
  const plan::ProbeScoresPlan plan = plan::plan_probe_scores(
      {batch, query_heads, kv_heads, tokens, probe_index.size(1), q.size(3), ops::host_threads(q)});
  const Tensor accumulated = zeros({batch, tokens}, ScalarType::Float, q.device());
  const Tensor normalized = zeros({batch, tokens}, ScalarType::Float, q.device());

  for (std::int64_t b = 0; b < batch; ++b) {
    const Positions probes = positions_of(select(probe_index, 0, b), std::nullopt, tokens, first);
    const Tensor query_rows = first > 0 ? shifted(probes.position, -first) : probes.position;
    const Tensor ends =
        last_key ? index_select(row_ends(select(*last_key, 0, b), tokens), 0, query_rows) : probes.position;
    const std::int64_t count = probes.position.size(0);
    const Tensor real_row = select(real, 0, b);
    const Tensor sums = zeros({tokens}, ScalarType::Float, q.device());
    const Tensor viewers = zeros({tokens}, ScalarType::Float, q.device());
    for (std::int64_t p = 0; p < count; p += plan.probes_per_block) {
      const std::int64_t rows = std::min(plan.probes_per_block, count - p);
      Positions block{slice(probes.position, 0, p, rows), std::nullopt};
      if (probes.valid) {
        block.valid = slice(*probes.valid, 0, p, rows);
      }
      const Tensor block_ends = slice(ends, 0, p, rows);
      const Columns columns = columns_of(block, block_ends, tokens, causal, token_mask.has_value());
      if (columns.seen == 0) {
        continue;
      }
      const Tensor block_rows = slice(query_rows, 0, p, rows);
      const Tensor allowed = visible(block, block_ends, real_row, positions, columns, causal);
      const Tensor hidden = logical_not(allowed);
      const std::optional<Tensor> blind = blind_probes(hidden, columns);
      add_into(viewers, 0, full({columns.clear}, static_cast<double>(rows), ScalarType::Float, q.device()));
      add_into(viewers, columns.clear, sum(allowed, 0, false, ScalarType::Float));
      const std::vector<Tensor> parts = run_tasks(plan.head_tasks, [&](std::int64_t task) {
        const std::int64_t heads_each = kv_heads / plan.head_tasks;
        Tensor part = zeros({columns.seen}, ScalarType::Float, q.device());
        for (std::int64_t g = task * heads_each; g < (task + 1) * heads_each; ++g) {
          const Tensor k_seen = slice(select(select(k, 0, b), 0, g), 0, 0, columns.seen);
          const Tensor k_transposed = transpose(to(k_seen, ScalarType::Float), 0, 1);
          for (std::int64_t h = 0; h < group; h += plan.heads_per_block) {
            const Tensor heads = slice(select(q, 0, b), 0, g * group + h, std::min(plan.heads_per_block, group - h));
            const Tensor q_block = to(take_rows(heads, block_rows), ScalarType::Float);
            part = plus(part, column_sums(q_block, k_transposed, hidden, blind, columns, factor));
          }
        }
        return part;
      });
      for (const Tensor& part : parts) {
        add_into(sums, 0, part);
      }
    }
    Tensor total = divide(sums, scalar(static_cast<double>(query_heads), ScalarType::Float));
    // A probe with a NaN leaves NaN in hidden places too; where no probe may look the score is 0 all the same.
    total = where(less(scalar(0.0, ScalarType::Float), viewers), total, scalar(0.0, ScalarType::Float, q.device()));
    const Tensor mean = divide(total, maximum(viewers, scalar(1.0, ScalarType::Float)));
    copy_into(select(accumulated, 0, b), total);
    copy_into(select(normalized, 0, b), mean);
  }
  return {accumulated, normalized};
}

}  // namespace zipvl::cpu
