// sparse_attn with a neighbourhood (docs/ops.md, step 5b): each row sees the last tokens and the first ones beside the
// selected. On the CPU the host reads the selection and the masks: rows that see the same far keys go in blocks, and a
// block computes one slice of near keys and the far ones before it. On any other device blocks compute every key, with
// masks that the device makes.
#include <algorithm>
#include <cmath>
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

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The sizes of a call; query row i stands at position first + i.
struct Shape {
  std::int64_t heads, kv_heads, group, head_dim, queries, tokens, first, window;
};

Shape sizes_of(const ops::SparseAttnArgs& args) {
  const std::int64_t heads = args.q.size(1), kv_heads = args.k.size(1), queries = args.q.size(2),
                     tokens = args.k.size(2);
  return {heads,   kv_heads, heads / kv_heads, args.q.size(3),
          queries, tokens,   tokens - queries, std::min(args.local_window, tokens)};
}

// q [Hq, n, D] -> [Hkv, G * n, D] float32, times the scale
Tensor scaled_queries(const Tensor& q, const Shape& sizes, const Tensor& scale) {
  return reshape(multiply(to(q, ScalarType::Float), scale), {sizes.kv_heads, sizes.group * q.size(1), sizes.head_dim});
}

// ---- the CPU

using Numbers = std::vector<std::int64_t>;
using Flags = std::vector<std::uint8_t>;

// Keys and values [Hkv, n, D] float32.
struct KeyValues {
  Tensor k, v;
};

// Query rows that see the same keys outside their windows.
struct RowGroup {
  Numbers rows;       // of q, ascending
  Flags far;          // [S]: seen by all of them, however far back
  Numbers positions;  // of those keys, as far as a window may begin after them
  KeyValues keys;     // theirs
};

// A block of a group's rows: rows [begin, begin + count).
struct RowBlock {
  const RowGroup* group;
  std::int64_t begin, count;
};

// One batch row of a call.
struct HostRow {
  Tensor q;        // [Hq, n, D]
  Flags real;      // [S]
  Numbers end;     // [n]: the last position that a row sees
  KeyValues near;  // keys from `near_first` on; values of padding are 0
  std::int64_t near_first;
};

Flags flags_of(const OptionalTensor& mask, std::int64_t b, std::int64_t tokens) {
  Flags flags(static_cast<std::size_t>(tokens), 1);
  if (mask) {
    const bool* row = mask->const_data_ptr<bool>() + b * mask->stride(0);
    for (std::int64_t s = 0; s < tokens; ++s) {
      flags[static_cast<std::size_t>(s)] = row[s * mask->stride(1)];
    }
  }
  return flags;
}

Numbers ends_of(const OptionalTensor& last_key, std::int64_t b, const Shape& sizes) {
  Numbers ends(static_cast<std::size_t>(sizes.queries));
  const std::int32_t* row = last_key ? last_key->const_data_ptr<std::int32_t>() + b * last_key->stride(0) : nullptr;
  for (std::int64_t i = 0; i < sizes.queries; ++i) {
    ends[static_cast<std::size_t>(i)] =
        row ? std::clamp<std::int64_t>(row[i * last_key->stride(1)], -1, sizes.tokens - 1) : sizes.first + i;
  }
  return ends;
}

// x [Hkv, n, D] in float32, with 0 for the values of tokens that are not real: a weight of 0 times NaN is no 0.
Tensor without_padding(const Tensor& x, const OptionalTensor& token_mask, std::int64_t b, std::int64_t first) {
  const Tensor wide = to(x, ScalarType::Float);
  if (!token_mask) {
    return wide;
  }
  const Tensor real = slice(select(*token_mask, 0, b), 0, first, x.size(1));
  return where(unsqueeze(unsqueeze(real, 0), 2), wide, scalar(0.0, ScalarType::Float));
}

bool all_finite(const Tensor& x) {
  const Tensor total = call("aten::sum", "", x, std::optional<ScalarType>());
  return std::isfinite(*total.const_data_ptr<float>());
}

// `rows` and what they see far back, out of k, v [Hkv, S, D].
RowGroup make_group(const Shape& sizes, Numbers rows, Flags far, const Tensor& k, const Tensor& v) {
  RowGroup group{std::move(rows), std::move(far), {}, {}};
  const std::int64_t last = group.rows.empty() ? 0 : sizes.first + group.rows.back() - sizes.window + 1;
  for (std::int64_t s = 0; s < last; ++s) {
    if (group.far[static_cast<std::size_t>(s)]) {
      group.positions.push_back(s);
    }
  }
  if (!group.positions.empty()) {
    const Tensor position = long_tensor(group.positions);
    group.keys = {to(take_rows(k, position), ScalarType::Float), to(take_rows(v, position), ScalarType::Float)};
  }
  return group;
}

// Blocks of a group: few enough rows, close enough together.
void add_blocks(const RowGroup& group, std::int64_t rows_per_block, std::int64_t span, std::vector<RowBlock>& blocks) {
  const std::int64_t total = static_cast<std::int64_t>(group.rows.size());
  const auto row = [&](std::int64_t i) { return group.rows[static_cast<std::size_t>(i)]; };
  for (std::int64_t begin = 0; begin < total;) {
    std::int64_t count = 1;
    while (count < rows_per_block && begin + count < total && row(begin + count) - row(begin) < span) {
      ++count;
    }
    blocks.push_back({&group, begin, count});
    begin += count;
  }
}

// [1, n, far + near] bool, which of a block's columns each row must not see: `far` columns of the group's positions and
// then those of the positions [low, high). `blind` [1, n, 1]: rows that see none.
struct Hidden {
  Tensor hidden;
  std::optional<Tensor> blind;
};

Hidden hidden_columns(const HostRow& row, const Shape& sizes, const RowBlock& block, std::int64_t far, std::int64_t low,
                      std::int64_t high) {
  const std::int64_t width = far + high - low;
  const Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor hidden = empty({1, block.count, width}, ScalarType::Bool, cpu);
  const Tensor blind = empty({1, block.count, 1}, ScalarType::Bool, cpu);
  bool any_blind = false;
  bool* out = hidden.mutable_data_ptr<bool>();
  for (std::int64_t i = 0; i < block.count; ++i, out += width) {
    const std::int64_t query = block.group->rows[static_cast<std::size_t>(block.begin + i)];
    const std::int64_t end = row.end[static_cast<std::size_t>(query)];
    // Near columns [low, from) are outside of the window, [from, to) inside, and the others after the row's end.
    const std::int64_t to = std::clamp(end + 1, low, high);
    const std::int64_t from = std::clamp(sizes.first + query - sizes.window + 1, low, to);
    const std::int64_t seen_far =
        std::upper_bound(block.group->positions.begin(), block.group->positions.begin() + far, end) -
        block.group->positions.begin();
    bool sees = seen_far > 0;
    std::fill(out, out + seen_far, false);
    std::fill(out + seen_far, out + far, true);
    bool* near = out + far;
    for (std::int64_t s = low; s < from; ++s) {
      const bool seen = block.group->far[static_cast<std::size_t>(s)] != 0;
      near[s - low] = !seen;
      sees = sees || seen;
    }
    for (std::int64_t s = from; s < to; ++s) {
      const bool seen = row.real[static_cast<std::size_t>(s)] != 0;
      near[s - low] = !seen;
      sees = sees || seen;
    }
    std::fill(near + (to - low), near + (high - low), true);
    blind.mutable_data_ptr<bool>()[i] = !sees;
    any_blind = any_blind || !sees;
  }
  return {hidden, any_blind ? std::optional<Tensor>(blind) : std::nullopt};
}

// A block's rows of the output: [n, Hq, D] float32.
Tensor attend(const HostRow& row, const Shape& sizes, const RowBlock& block, const Tensor& scale) {
  const RowGroup& group = *block.group;
  const std::int64_t* rows = group.rows.data() + block.begin;
  const std::int64_t n = block.count;
  const Numbers chosen(rows, rows + n);
  std::int64_t high = 0, least = sizes.tokens;
  for (const std::int64_t i : chosen) {
    high = std::max(high, row.end[static_cast<std::size_t>(i)] + 1);
    least = std::min(least, row.end[static_cast<std::size_t>(i)]);
  }
  // The slice of near keys, and the group's keys before it.
  const std::int64_t low = std::min(std::max<std::int64_t>(sizes.first + rows[0] - sizes.window + 1, 0), high);
  const std::int64_t far =
      std::lower_bound(group.positions.begin(), group.positions.end(), low) - group.positions.begin();
  // Where every row ends before its window, all keys are far ones.
  const std::int64_t near_low = std::max(low, row.near_first);
  const std::int64_t near = std::max<std::int64_t>(high - near_low, 0);
  const std::int64_t columns = far + near;
  if (columns == 0) {
    return zeros({n, sizes.heads, sizes.head_dim}, ScalarType::Float, row.q.device());
  }
  const bool contiguous_rows = rows[n - 1] - rows[0] == n - 1;
  const Tensor q_rows = contiguous_rows ? slice(row.q, 1, rows[0], n) : take_rows(row.q, long_tensor(chosen));
  const Tensor queries = scaled_queries(q_rows, sizes, scale);

  const Tensor scores = empty({sizes.kv_heads, sizes.group * n, columns}, ScalarType::Float, row.q.device());
  const auto part = [&](const Tensor& x, bool of_near) { return slice(x, 2, of_near ? far : 0, of_near ? near : far); };
  const auto keys = [&](const Tensor& x) { return slice(x, 1, near_low - row.near_first, near); };
  if (far > 0) {
    multiply_into(part(scores, false), queries, transpose(slice(group.keys.k, 1, 0, far), 1, 2));
  }
  if (near > 0) {
    multiply_into(part(scores, true), queries, transpose(keys(row.near.k), 1, 2));
  }
  // Far keys need no mask where every row ends after them.
  const std::int64_t clear = far > 0 && group.positions[static_cast<std::size_t>(far - 1)] <= least ? far : 0;
  const Hidden hidden = hidden_columns(row, sizes, block, far, near_low, near_low + near);
  const Tensor by_query = reshape(scores, {sizes.heads, n, columns});
  masked_fill_(slice(by_query, 2, clear, columns - clear), slice(hidden.hidden, 2, clear, columns - clear), -kInfinity);
  const Tensor by_head = softmax(by_query, 2);
  if (hidden.blind) {
    masked_fill_(by_head, *hidden.blind, 0.0);
  }
  const Tensor weights = reshape(by_head, {sizes.kv_heads, sizes.group * n, columns});
  std::optional<Tensor> out;
  if (far > 0) {
    out = matmul(part(weights, false), slice(group.keys.v, 1, 0, far));
  }
  if (near > 0) {
    const Tensor more = matmul(part(weights, true), keys(row.near.v));
    out = out ? plus(*out, more) : more;
  }
  return transpose(reshape(*out, {sizes.heads, n, sizes.head_dim}), 0, 1);
}

void host_row(const ops::SparseAttnArgs& args, const Shape& sizes, std::int64_t b, const Tensor& scale,
              const Tensor& out) {
  const Tensor k = select(args.k, 0, b), v = select(args.v, 0, b);
  HostRow row{select(args.q, 0, b),
              flags_of(args.token_mask, b, sizes.tokens),
              ends_of(args.last_key, b, sizes),
              {},
              std::max<std::int64_t>(sizes.first - sizes.window + 1, 0)};
  const std::int64_t near = sizes.tokens - row.near_first;
  row.near = {to(slice(k, 1, row.near_first, near), ScalarType::Float),
              without_padding(slice(v, 1, row.near_first, near), args.token_mask, b, row.near_first)};

  Flags sinks(static_cast<std::size_t>(sizes.tokens), 0);
  for (std::int64_t s = 0, left = args.num_sinks; s < sizes.tokens && left > 0; ++s) {
    if (row.real[static_cast<std::size_t>(s)]) {
      sinks[static_cast<std::size_t>(s)] = 1;
      --left;
    }
  }
  Flags chosen(static_cast<std::size_t>(sizes.tokens), 0);
  const Tensor position = positions_of(select(args.index, 0, b), select(args.count, 0, b), sizes.tokens).position;
  for (std::int64_t i = 0; i < position.size(0); ++i) {
    const auto s = static_cast<std::size_t>(position.const_data_ptr<std::int64_t>()[i]);
    chosen[s] = row.real[s];
  }
  Numbers of_chosen, of_others;
  for (std::int64_t i = 0; i < sizes.queries; ++i) {
    const auto s = static_cast<std::size_t>(sizes.first + i);
    if (row.real[s]) {
      (args.all_queries || chosen[s] ? of_chosen : of_others).push_back(i);
    }
  }
  Flags both = sinks;
  for (std::size_t s = 0; s < both.size(); ++s) {
    both[s] = both[s] || chosen[s];
  }
  const RowGroup groups[] = {make_group(sizes, std::move(of_chosen), std::move(both), k, v),
                             make_group(sizes, std::move(of_others), std::move(sinks), k, v)};
  bool finite = all_finite(row.near.v);
  for (const RowGroup& group : groups) {
    finite = finite && (group.positions.empty() || all_finite(group.keys.v));
  }
  std::int64_t ahead = 0;  // how far a row sees past itself
  for (std::int64_t i = 0; i < sizes.queries; ++i) {
    ahead = std::max(ahead, row.end[static_cast<std::size_t>(i)] - (sizes.first + i));
  }
  std::vector<RowBlock> blocks;
  for (const RowGroup& group : groups) {
    const plan::WindowAttnPlan plan =
        plan::plan_window_attn(sizes.heads, sizes.window + ahead, static_cast<std::int64_t>(group.positions.size()));
    // A row alone computes no value that it does not see, so that it cannot meet another's NaN.
    add_blocks(group, finite ? plan.rows_per_block : 1, plan.span, blocks);
  }
  const std::int64_t total = static_cast<std::int64_t>(blocks.size());
  const std::int64_t tasks = std::min(ops::host_threads(args.q), total);
  if (tasks == 0) {
    return;
  }
  // Later blocks see more: each task takes every `tasks`-th one.
  const auto rows_of = [&](std::int64_t task) {
    Numbers rows;
    for (std::int64_t i = task; i < total; i += tasks) {
      const RowBlock& block = blocks[static_cast<std::size_t>(i)];
      const auto begin = block.group->rows.begin() + block.begin;
      rows.insert(rows.end(), begin, begin + block.count);
    }
    return rows;
  };
  const std::vector<Tensor> parts = run_tasks(tasks, [&](std::int64_t task) {
    const std::int64_t rows = static_cast<std::int64_t>(rows_of(task).size());
    const Tensor made = empty({rows, sizes.heads, sizes.head_dim}, args.q.scalar_type(), args.q.device());
    std::int64_t place = 0;
    for (std::int64_t i = task; i < total; i += tasks) {
      const RowBlock& block = blocks[static_cast<std::size_t>(i)];
      copy_into(slice(made, 0, place, block.count), attend(row, sizes, block, scale));
      place += block.count;
    }
    return made;
  });
  for (std::int64_t task = 0; task < tasks; ++task) {
    index_copy_(out, 0, long_tensor(rows_of(task)), parts[static_cast<std::size_t>(task)]);
  }
}

// ---- other devices

// One batch row, with nothing read on the host. `real` [S] bool.
void device_row(const ops::SparseAttnArgs& args, const Shape& sizes, std::int64_t b, const Tensor& scale,
                const Tensor& real, const Tensor& sinks, std::int64_t rows_per_block, const Tensor& out) {
  const Device device = args.q.device();
  const std::int64_t S = sizes.tokens;
  const Tensor position = iota(S, ScalarType::Long, device);
  const Tensor until = shifted(position, sizes.window);  // the first position that has left the key's window
  const Positions selected = positions_of(select(args.index, 0, b), select(args.count, 0, b), S);
  const Tensor nowhere = scalar(static_cast<double>(S), ScalarType::Long, device);
  const Tensor named = selected.valid ? where(*selected.valid, selected.position, nowhere) : selected.position;
  const Tensor none = zeros({S + 1}, ScalarType::Bool, device);
  const Tensor set = full({named.size(0)}, 1.0, ScalarType::Bool, device);
  const Tensor chosen = logical_and(slice(scatter(none, 0, named, set), 0, 0, S), real);
  const Tensor ends =
      args.last_key ? row_ends(select(*args.last_key, 0, b), S) : slice(position, 0, sizes.first, sizes.queries);

  const Tensor q = select(args.q, 0, b);
  const Tensor k = to(select(args.k, 0, b), ScalarType::Float);
  const Tensor v = where(unsqueeze(unsqueeze(real, 0), 2), to(select(args.v, 0, b), ScalarType::Float),
                         scalar(0.0, ScalarType::Float, device));
  // Values that are not finite reach the rows that see them, which is not what a weight of 0 makes of them.
  const Tensor good = isfinite(v);
  const Tensor v_good = where(good, v, scalar(0.0, ScalarType::Float, device));
  const Tensor v_bad = to(logical_not(good), ScalarType::Float);
  for (std::int64_t begin = 0; begin < sizes.queries; begin += rows_per_block) {
    const std::int64_t n = std::min(rows_per_block, sizes.queries - begin);
    const std::int64_t columns = args.last_key ? S : sizes.first + begin + n;
    const auto keys = [&](const Tensor& x) { return unsqueeze(slice(x, 0, 0, columns), 0); };
    const auto rows = [&](const Tensor& x) { return unsqueeze(slice(x, 0, sizes.first + begin, n), 1); };
    const Tensor near = logical_and(less(rows(position), keys(until)), keys(real));
    const Tensor all_rows = full({n, 1}, 1.0, ScalarType::Bool, device);
    const Tensor far = logical_and(args.all_queries ? all_rows : rows(chosen), keys(chosen));
    Tensor seen = less_equal(keys(position), unsqueeze(slice(ends, 0, begin, n), 1));
    seen = logical_and(logical_and(seen, rows(real)), logical_or(logical_or(near, far), keys(sinks)));
    const Tensor hidden = logical_not(seen);

    const Tensor queries = scaled_queries(slice(q, 1, begin, n), sizes, scale);
    const Tensor scores = reshape(matmul(queries, transpose(slice(k, 1, 0, columns), 1, 2)), {sizes.heads, n, columns});
    masked_fill_(scores, unsqueeze(hidden, 0), -kInfinity);
    const Tensor weights = softmax(scores, 2);
    masked_fill_(weights, unsqueeze(all(hidden, 1, /*keepdim=*/true), 0), 0.0);
    const Tensor by_group =
        matmul(reshape(weights, {sizes.kv_heads, sizes.group * n, columns}), slice(v_good, 1, 0, columns));
    const Tensor result = reshape(by_group, {sizes.kv_heads, sizes.group, n, sizes.head_dim});
    const Tensor bad = matmul(to(seen, ScalarType::Float), slice(v_bad, 1, 0, columns));  // [Hkv, n, D]
    masked_fill_(result, unsqueeze(less(scalar(0.0, ScalarType::Float, device), bad), 1),
                 std::numeric_limits<double>::quiet_NaN());
    copy_into(slice(out, 0, begin, n), transpose(reshape(result, {sizes.heads, n, sizes.head_dim}), 0, 1));
  }
}

}  // namespace

Tensor window_attn(const ops::SparseAttnArgs& args) {
  const Shape sizes = sizes_of(args);
  const std::int64_t batch = args.q.size(0);
  const Device device = args.q.device();
  const Tensor scale = scalar(ops::scale_or_default(args.scale, sizes.head_dim), ScalarType::Float);
  const Tensor out = zeros({batch, sizes.queries, sizes.heads, sizes.head_dim}, args.q.scalar_type(), device);
  if (host_may_read(args.q)) {
    for (std::int64_t b = 0; b < batch; ++b) {
      host_row(args, sizes, b, scale, select(out, 0, b));
    }
    return transpose(out, 1, 2);
  }
  const plan::SparseAttnPlan plan =
      plan::plan_sparse_attn({batch, sizes.heads, sizes.kv_heads, sizes.queries, sizes.head_dim, sizes.tokens,
                              /*causal=*/true, /*all_queries=*/true, /*count_on_host=*/false, /*threads=*/1});
  const Tensor real = real_tokens(args.token_mask, batch, sizes.tokens, device);
  const Tensor sinks = first_real_tokens(real, args.num_sinks);
  for (std::int64_t b = 0; b < batch; ++b) {
    device_row(args, sizes, b, scale, select(real, 0, b), select(sinks, 0, b), plan.rows_per_block, select(out, 0, b));
  }
  return transpose(out, 1, 2);
}

}  // namespace zipvl::cpu
