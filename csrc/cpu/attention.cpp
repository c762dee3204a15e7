// Attention among the selected tokens (ZipVL Sec. 3, Algorithm 1). A row of the batch: read its selection, gather K and
// V, then blocks of queries, each against the keys that its last query sees.
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

// x [H, N, D] -> the selected rows [H, n, D] in float32; rows that do not count are 0, whatever stands in x.
Tensor gather_rows(const Tensor& x, const Positions& selection) {
  const Tensor rows = to(take_rows(x, selection.position), ScalarType::Float);
  if (selection.valid) {
    masked_fill_(rows, unsqueeze(unsqueeze(logical_not(*selection.valid), 0), 2), 0.0);
  }
  return rows;
}

// The selected keys that a block of queries sees; ends [n]: the last position that each sees.
Columns columns_of(const Positions& keys, const Tensor& ends, bool causal) {
  const std::int64_t count = keys.position.size(0);
  if (keys.valid) {
    return {0, count};
  }
  if (!causal) {
    return {count, count};
  }
  const std::int64_t* begin = keys.position.const_data_ptr<std::int64_t>();
  const std::int64_t* end = ends.const_data_ptr<std::int64_t>();
  const auto [least, most] = std::minmax_element(end, end + ends.size(0));
  const std::int64_t first = std::upper_bound(begin, begin + count, *least) - begin;
  const std::int64_t last = std::upper_bound(begin, begin + count, *most) - begin;
  return {std::min(first, last), std::max(first, last)};
}

// [n, seen - clear] bool: the columns from `clear` on that each query must not see.
Tensor hidden_columns(const Positions& keys, const Tensor& ends, const Columns& columns, bool causal) {
  const std::int64_t width = columns.seen - columns.clear;
  const Tensor position = unsqueeze(slice(keys.position, 0, columns.clear, width), 0);
  Tensor hidden =
      causal ? less(unsqueeze(ends, 1), position) : zeros({ends.size(0), width}, ScalarType::Bool, ends.device());
  if (keys.valid) {
    hidden = logical_or(hidden, unsqueeze(logical_not(slice(*keys.valid, 0, columns.clear, width)), 0));
  }
  return hidden;
}

// A block of n queries, as every head sees it.
struct Block {
  Columns columns;
  std::optional<Tensor> hidden;  // [1, n, seen - clear] bool; absent when nothing is
  std::optional<Tensor> blind;   // [1, n, 1] bool: queries that see no key; absent when there are none
};

Block block_of(const Positions& keys, const Tensor& ends, bool causal) {
  Block block{columns_of(keys, ends, causal), std::nullopt, std::nullopt};
  if (block.columns.clear < block.columns.seen) {
    const Tensor hidden = hidden_columns(keys, ends, block.columns, causal);
    block.hidden = unsqueeze(hidden, 0);
    if (block.columns.clear == 0) {
      block.blind = unsqueeze(all(hidden, 1, /*keepdim=*/true), 0);
    }
  }
  return block;
}

// Queries q [Hq, n, D] of a block against the selected keys; k, v [Hkv, m, D] float32, at least one key seen.
// Returns [n, Hq, D] float32; a query that sees no key gives 0.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Block& block, const Tensor& scale) {
  const Columns& columns = block.columns;
  const std::int64_t heads = q.size(0), n = q.size(1), head_dim = q.size(2);
  const std::int64_t kv_heads = k.size(0), group = heads / kv_heads;
  const Tensor scaled = reshape(multiply(to(q, ScalarType::Float), scale), {kv_heads, group * n, head_dim});
  const Tensor scores = matmul(scaled, transpose(slice(k, 1, 0, columns.seen), 1, 2));
  const Tensor by_query = reshape(scores, {heads, n, columns.seen});
  if (block.hidden) {
    masked_fill_(slice(by_query, 2, columns.clear, columns.seen - columns.clear), *block.hidden,
                 -std::numeric_limits<double>::infinity());
  }
  const Tensor weights = softmax(by_query, 2);
  if (block.blind) {
    masked_fill_(weights, *block.blind, 0.0);
  }
  const Tensor out = matmul(reshape(weights, {kv_heads, group * n, columns.seen}), slice(v, 1, 0, columns.seen));
  return transpose(reshape(out, {heads, n, head_dim}), 0, 1);
}

// The heads of x [H, ...] that belong to one of `tasks` tasks.
Tensor head_part(const Tensor& x, std::int64_t task, std::int64_t tasks) {
  const std::int64_t heads = x.size(0) / tasks;
  return slice(x, 0, task * heads, heads);
}

// rows [places, Hq, D], results of the selected queries -> out [n, Hq, D], other rows 0; where only the device knows
// which places of the selection count.
void scatter_valid(const Tensor& rows, const Positions& selection, const Tensor& places, const Tensor& out) {
  // Which place of the selection each token took; the extra last entry takes the places that do not count.
  const std::int64_t tokens = out.size(0);
  const Tensor outside = scalar(static_cast<double>(tokens), ScalarType::Long, out.device());
  const Tensor target = where(*selection.valid, selection.position, outside);
  const Tensor place =
      slice(scatter(full({tokens + 1}, -1.0, ScalarType::Long, out.device()), 0, target, places), 0, 0, tokens);
  const Tensor zero = scalar(0, ScalarType::Long, out.device());
  const Tensor chosen = less_equal(zero, place);
  copy_into(out, index_select(rows, 0, where(chosen, place, zero)));
  masked_fill_(out, unsqueeze(unsqueeze(logical_not(chosen), 1), 2), 0.0);
}

// The most selected tokens any row can have, as far as the host knows without asking the device.
std::int64_t max_keys(const Tensor& count, std::int64_t tokens) {
  if (!host_may_read(count)) {
    return tokens;
  }
  std::int64_t max = 0;
  for (std::int64_t b = 0; b < count.size(0); ++b) {
    max = std::max(max, host_count(count, b, tokens));
  }
  return max;
}

}  // namespace

Tensor sparse_attn(const ops::SparseAttnArgs& args) {
  if (args.local_window > 0) {
    return window_attn(args);
  }
  const auto& [q, k, v, index, count, scale, causal, all_queries, token_mask, window, sinks, last_key] = args;
  const std::int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), head_dim = q.size(3);
  const std::int64_t tokens = k.size(2), first = tokens - queries;
  const Tensor places = iota(tokens, ScalarType::Long, q.device());
  const Tensor factor = scalar(ops::scale_or_default(scale, head_dim), ScalarType::Float);
  const plan::SparseAttnPlan plan =
      plan::plan_sparse_attn({batch, heads, k.size(1), queries, head_dim, max_keys(count, tokens), causal, all_queries,
                              host_may_read(q), ops::host_threads(q)});
  const Tensor out = zeros({batch, queries, heads, head_dim}, q.scalar_type(), q.device());
  for (std::int64_t b = 0; b < batch; ++b) {
    const Positions keys = positions_of(select(index, 0, b), select(count, 0, b), tokens);
    const Tensor q_row = select(q, 0, b), out_row = select(out, 0, b);
    const Tensor k_rows = gather_rows(select(k, 0, b), keys), v_rows = gather_rows(select(v, 0, b), keys);
    // The tokens that have a query which is computed: their positions, the rows of q, and the last keys they see.
    const Positions chosen = first > 0 ? positions_of(select(index, 0, b), select(count, 0, b), tokens, first) : keys;
    const Tensor positions = all_queries ? slice(places, 0, first, queries) : chosen.position;
    const Tensor query_rows = first > 0 ? shifted(positions, -first) : positions;
    const Tensor ends = last_key ? index_select(row_ends(select(*last_key, 0, b), tokens), 0, query_rows) : positions;
    // With places that do not count, results wait here until it is known where they belong.
    const bool waits = keys.valid && !all_queries;
    const Tensor results = waits ? empty({tokens, heads, head_dim}, q.scalar_type(), q.device()) : out_row;
    for (std::int64_t begin = 0, total = positions.size(0); begin < total; begin += plan.rows_per_block) {
      const std::int64_t n = std::min(plan.rows_per_block, total - begin);
      const Tensor rows = slice(query_rows, 0, begin, n);
      const Block block = block_of(keys, slice(ends, 0, begin, n), causal);
      if (block.columns.seen == 0) {
        continue;  // no query of the block sees a key, and `out` is 0 already
      }
      const Tensor q_block = all_queries ? slice(q_row, 1, begin, n) : take_rows(q_row, rows);
      const std::vector<Tensor> parts = run_tasks(plan.head_tasks, [&](std::int64_t task) {
        return to(attend(head_part(q_block, task, plan.head_tasks), head_part(k_rows, task, plan.head_tasks),
                         head_part(v_rows, task, plan.head_tasks), block, factor),
                  q.scalar_type());
      });
      const std::int64_t heads_each = heads / plan.head_tasks;
      for (std::int64_t task = 0; task < plan.head_tasks; ++task) {
        const Tensor target = slice(results, 1, task * heads_each, heads_each);
        const Tensor& part = parts[static_cast<std::size_t>(task)];
        if (all_queries || waits) {
          copy_into(slice(target, 0, begin, n), part);
        } else {
          index_copy_(target, 0, rows, part);
        }
      }
    }
    if (waits) {
      scatter_valid(results, {query_rows, chosen.valid}, places, out_row);
    }
  }
  if (token_mask) {
    const Tensor padding = logical_not(slice(*token_mask, 1, first, queries));
    masked_fill_(out, unsqueeze(unsqueeze(padding, 2), 3), 0.0);
  }
  return transpose(out, 1, 2);
}

// One query a row against the first `lengths` slots of its cache, with the log-sum-exp that merges partial results.
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
