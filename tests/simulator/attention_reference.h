// What the tests of sparse_attn's kernels share: random cases, and the largest error against float64.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/sparse_attn/params.h"
#include "reference.h"

namespace emulated {

struct Case {
  int batch, query_heads, kv_heads, tokens;
  bool causal, all_queries;
};

inline Case random_case() {
  const int kv_heads = uniform(1, 2), groups[] = {1, 3, 7};
  return {uniform(1, 2),     kv_heads * groups[uniform(0, 2)], kv_heads, uniform(1, 400), uniform(0, 2) != 0,
          uniform(0, 2) == 0};
}

template <typename Element>
std::vector<Element> random_rows(std::size_t rows, int D) {
  std::vector<Element> values(rows * D);
  fill_normal(values);
  return values;
}

// The largest error of launch(params). q, k and v lie as [batch, tokens, heads, D] and are NaN where nobody may look;
// places of index past the count hold the number of tokens.
template <typename Element, int D, typename Launch>
double error_of(const Case& c, const Launch& launch) {
  const std::size_t rows = static_cast<std::size_t>(c.batch) * c.tokens;
  auto q = random_rows<Element>(rows * c.query_heads, D);
  auto k = random_rows<Element>(rows * c.kv_heads, D), v = random_rows<Element>(rows * c.kv_heads, D);
  std::vector<Element> out(q.size(), Element(NAN));
  std::vector<std::int32_t> index(rows, c.tokens), count(c.batch, 0);
  for (int b = 0; b < c.batch; ++b) {
    const int share = uniform(0, 4);  // of four; 0: one token alone
    for (int n = 0; n < c.tokens; ++n) {
      const std::size_t token = static_cast<std::size_t>(b) * c.tokens + n;
      if (share == 0 ? n == c.tokens / 2 : uniform(1, 4) <= share) {
        index[static_cast<std::size_t>(b) * c.tokens + count[b]++] = n;
        continue;
      }
      for (auto* rows_of : {&k, &v}) {
        std::fill_n(rows_of->begin() + token * c.kv_heads * D, c.kv_heads * D, Element(NAN));
      }
      if (!c.all_queries) {
        std::fill_n(q.begin() + token * c.query_heads * D, c.query_heads * D, Element(NAN));
      }
    }
  }

  zipvl::cuda::SparseAttnParams params{};
  params.q = q.data();
  params.k = k.data();
  params.v = v.data();
  params.out = out.data();
  const auto set = [&](std::int64_t (&strides)[3], int heads) {
    strides[0] = std::int64_t{c.tokens} * heads * D;
    strides[1] = D;
    strides[2] = std::int64_t{heads} * D;
  };
  set(params.q_stride, c.query_heads);
  set(params.k_stride, c.kv_heads);
  set(params.v_stride, c.kv_heads);
  params.index = index.data();
  params.index_stride[0] = c.tokens;
  params.index_stride[1] = params.count_stride = 1;
  params.count = count.data();
  params.batch = c.batch;
  params.query_heads = c.query_heads;
  params.kv_heads = c.kv_heads;
  params.tokens = c.tokens;
  params.head_dim = D;
  params.scale = 1.0F / std::sqrt(static_cast<float>(D));
  params.causal = c.causal;
  params.all_queries = c.all_queries;
  params.zeros = c.all_queries ? nullptr : params.out;
  params.zero_row_bytes = static_cast<std::int64_t>(c.query_heads) * D * static_cast<std::int64_t>(sizeof(Element));
  params.element = std::is_same_v<Element, __half> ? zipvl::cuda::Element::kFloat16 : zipvl::cuda::Element::kBFloat16;
  launch(params);

  const auto wide_q = widened(q), wide_k = widened(k), wide_v = widened(v), wide_out = widened(out);
  double worst = 0.0;
  std::vector<const double*> keys, values;
  for (int b = 0; b < c.batch; ++b) {
    const std::int32_t* selected = &index[static_cast<std::size_t>(b) * c.tokens];
    for (int n = 0; n < c.tokens; ++n) {
      const auto seen = c.causal ? std::upper_bound(selected, selected + count[b], n) : selected + count[b];
      const bool attends = c.all_queries || std::binary_search(selected, selected + count[b], n);
      for (int h = 0; h < c.query_heads; ++h) {
        const std::size_t query = (static_cast<std::size_t>(b) * c.tokens + n) * c.query_heads + h;
        keys.clear();
        values.clear();
        for (const std::int32_t* token = selected; token < seen && attends; ++token) {
          const std::size_t row =
              (static_cast<std::size_t>(b) * c.tokens + *token) * c.kv_heads + h / (c.query_heads / c.kv_heads);
          keys.push_back(&wide_k[row * D]);
          values.push_back(&wide_v[row * D]);
        }
        worst = std::max(worst, difference(&wide_out[query * D], attend(&wide_q[query * D], D, keys, values).out));
      }
    }
  }
  return worst;
}

inline void report_attention(Report& report, const char* name, const Case& c, double error, double most) {
  report(error <= most, "%s batch %d heads %2d/%d tokens %3d%s%s: error %.5f", name, c.batch, c.query_heads, c.kv_heads,
         c.tokens, c.causal ? " causal" : "", c.all_queries ? " all queries" : "", error);
}

}  // namespace emulated
