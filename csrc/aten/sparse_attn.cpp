// Attention among the selected tokens (ZipVL Sec. 3, Algorithm 1). The stages of a row: read its selection, gather K
// and V, attend, put the results where their queries stood.
#include <algorithm>
#include <vector>

#include "aten/call.h"
#include "aten/kernels.h"

namespace zipvl::aten {
namespace {

// T of one batch row, in ascending order.
struct Selection {
  Tensor position;              // [n] int64, inside [0, N)
  std::optional<Tensor> valid;  // [n] bool; absent when every place counts
};

Selection host_selection(const Tensor& index, const Tensor& count, std::int64_t b, std::int64_t tokens) {
  const Tensor row = select(index, 0, b);
  const std::int32_t* entries = row.const_data_ptr<std::int32_t>();
  std::vector<std::int64_t> kept;
  for (std::int64_t i = 0, n = host_count(count, b, tokens); i < n; ++i) {
    const std::int64_t position = entries[i * row.stride(0)];
    if (position >= 0 && position < tokens) {
      kept.push_back(position);
    }
  }
  const Tensor position = empty({static_cast<std::int64_t>(kept.size())}, ScalarType::Long, row.device());
  std::copy(kept.begin(), kept.end(), position.mutable_data_ptr<std::int64_t>());
  return {position, std::nullopt};
}

Selection device_selection(const Tensor& index, const Tensor& count, std::int64_t b, const Tensor& places) {
  const Tensor row = to(select(index, 0, b), ScalarType::Long);
  const Tensor first = scalar(0, ScalarType::Long);
  const Tensor last = scalar(static_cast<double>(row.size(0) - 1), ScalarType::Long);
  const Tensor inside = logical_and(less_equal(first, row), less_equal(row, last));
  const Tensor valid = logical_and(inside, less(places, to(select(count, 0, b), ScalarType::Long)));
  return {where(valid, row, first), valid};
}

// x [H, N, D] -> the selected rows [H, n, D]; rows that do not count are 0, whatever stands in x.
Tensor gather_rows(const Tensor& x, const Selection& selection) {
  const Tensor rows = take_rows(x, selection.position);
  if (selection.valid) {
    masked_fill_(rows, unsqueeze(unsqueeze(logical_not(*selection.valid), 0), 2), 0.0);
  }
  return rows;
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& allowed, bool causal,
              double scale) {
  return select(attention(unsqueeze(q, 0), unsqueeze(k, 0), unsqueeze(v, 0), allowed, causal, scale), 0, 0);
}

// Queries q [Hq, n, D] standing at positions `rows` [n] against the selected keys, those past the row's position hidden
// under causal: [Hq, n, D], 0 where a row sees no key.
Tensor attend_masked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows, const Selection& keys,
                     bool causal, double scale) {
  Tensor allowed = causal ? less_equal(unsqueeze(keys.position, 0), unsqueeze(rows, 1))
                          : full({rows.size(0), keys.position.size(0)}, 1.0, ScalarType::Bool, q.device());
  if (keys.valid) {
    allowed = logical_and(allowed, unsqueeze(*keys.valid, 0));
  }
  const Tensor out = attend(q, k, v, allowed, /*causal=*/false, scale);
  masked_fill_(out, unsqueeze(logical_not(any(allowed, 1, true)), 0), 0.0);
  return out;
}

// How many of the ascending keys stand at or before `row`; all of them where only the device can tell.
std::int64_t keys_up_to(const Selection& keys, std::int64_t row) {
  const std::int64_t count = keys.position.size(0);
  if (keys.valid) {
    return count;
  }
  const std::int64_t* begin = keys.position.const_data_ptr<std::int64_t>();
  return std::upper_bound(begin, begin + count, row) - begin;
}

// Every row of q [Hq, R, D], standing at positions `rows`, in blocks: [Hq, R, D]
Tensor attend_in_blocks(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows, const Selection& keys,
                        bool causal, bool rows_are_positions, double scale, std::int64_t rows_per_block) {
  const std::int64_t total = rows.size(0);
  const Tensor out = empty({q.size(0), total, q.size(2)}, q.scalar_type(), q.device());
  for (std::int64_t begin = 0; begin < total; begin += rows_per_block) {
    const std::int64_t n = std::min(rows_per_block, total - begin);
    const std::int64_t seen = causal && rows_are_positions ? keys_up_to(keys, begin + n - 1) : keys.position.size(0);
    Tensor target = slice(out, 1, begin, n);
    if (seen == 0) {
      torch::stable::zero_(target);
      continue;
    }
    const Selection block{slice(keys.position, 0, 0, seen), keys.valid};
    copy_into(target, attend_masked(slice(q, 1, begin, n), slice(k, 1, 0, seen), slice(v, 1, 0, seen),
                                    slice(rows, 0, begin, n), block, causal, scale));
  }
  return out;
}

// rows [Hq, n, D] of the selected queries -> out [N, Hq, D], other rows 0
void scatter_rows(const Tensor& rows, const Selection& selection, const Tensor& places, const Tensor& out) {
  const Tensor by_token = transpose(rows, 0, 1);
  if (!selection.valid) {
    index_copy_(out, 0, selection.position, by_token);
    return;
  }
  // Which place of the selection each token took; the extra last entry takes the places that do not count.
  const std::int64_t tokens = out.size(0);
  const Tensor target =
      where(*selection.valid, selection.position, scalar(static_cast<double>(tokens), ScalarType::Long));
  Tensor place = scatter(full({tokens + 1}, -1.0, ScalarType::Long, out.device()), 0, target, places);
  place = slice(place, 0, 0, tokens);
  const Tensor zero = scalar(0, ScalarType::Long);
  const Tensor chosen = less_equal(zero, place);
  copy_into(out, index_select(by_token, 0, where(chosen, place, zero)));
  masked_fill_(out, unsqueeze(unsqueeze(logical_not(chosen), 1), 2), 0.0);
}

}  // namespace

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   double scale, const plan::SparseAttnPlan& plan, bool causal, bool all_queries) {
  const std::int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
  const Tensor places = iota(tokens, ScalarType::Long, q.device());
  const Tensor out = zeros({batch, tokens, heads, head_dim}, q.scalar_type(), q.device());
  for (std::int64_t b = 0; b < batch; ++b) {
    const Selection keys =
        q.is_cpu() ? host_selection(index, count, b, tokens) : device_selection(index, count, b, places);
    if (keys.position.size(0) == 0) {
      continue;
    }
    const Tensor q_row = select(q, 0, b), out_row = select(out, 0, b);
    const Tensor k_rows = gather_rows(select(k, 0, b), keys), v_rows = gather_rows(select(v, 0, b), keys);
    const Tensor queries = all_queries ? q_row : gather_rows(q_row, keys);
    const Tensor& rows = all_queries ? places : keys.position;
    const Tensor result = plan.masked ? attend_in_blocks(queries, k_rows, v_rows, rows, keys, causal, all_queries,
                                                         scale, plan.rows_per_block)
                                      : attend(queries, k_rows, v_rows, std::nullopt, causal && !all_queries, scale);
    if (all_queries) {
      copy_into(out_row, transpose(result, 0, 1));
    } else {
      scatter_rows(result, keys, places, out_row);
    }
  }
  return transpose(out, 1, 2);
}

}  // namespace zipvl::aten
