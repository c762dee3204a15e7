// Steps 1 to 5 in one call, with and without the packed keys and values. Each step goes through the dispatcher, so this
// file serves every device.
#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

// keep_mask and the `keep_recent` last real tokens of each row.
std::optional<Tensor> tokens_to_keep(const std::optional<Tensor>& keep_mask, const Tensor& real,
                                     std::int64_t keep_recent) {
  if (keep_recent == 0) {
    return keep_mask;
  }
  const Tensor recent = aten::last_real_tokens(real, keep_recent);
  return keep_mask ? aten::logical_or(*keep_mask, recent) : recent;
}

// Steps 1 to 4: index and count.
Pair important_tokens(const Tensor& q, const Tensor& k, double tau, std::optional<double> ratio,
                      std::int64_t num_recent, std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent,
                      std::int64_t min_tokens, std::optional<double> scale, bool causal,
                      const std::optional<Tensor>& keep_mask, const std::optional<Tensor>& token_mask) {
  const Tensor probes = aten::call("zipvl::probe_index", "", q, num_recent, num_random, seed, token_mask);
  const auto [accumulated, normalized] =
      aten::call<Pair>("zipvl::probe_scores", "", q, k, probes, scale, causal, token_mask);
  const Tensor real = aten::real_tokens(token_mask, q.size(0), q.size(2), q.device());
  return aten::call<Pair>("zipvl::select_tokens", "", accumulated, normalized, tau, ratio, min_tokens,
                          tokens_to_keep(keep_mask, real, keep_recent), token_mask);
}

// Step 5.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Pair& selection, bool all_queries,
              std::optional<double> scale, bool causal, const std::optional<Tensor>& token_mask) {
  const auto& [index, count] = selection;
  const Tensor out = aten::call("zipvl::sparse_attn", "", q, k, v, index, count, scale, causal, all_queries);
  if (all_queries && token_mask) {
    const Tensor padding = aten::unsqueeze(aten::unsqueeze(aten::logical_not(*token_mask), 1), 3);
    aten::masked_fill_(out, padding, 0.0);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> nothing(const checks::AttentionSizes& sizes, const Tensor& q) {
  const aten::Sizes shape{sizes.batch, sizes.tokens, sizes.query_heads, sizes.head_dim};
  return {aten::transpose(aten::empty(shape, q.scalar_type(), q.device()), 1, 2),
          aten::zeros({sizes.batch, sizes.tokens}, aten::ScalarType::Int, q.device()),
          aten::zeros({sizes.batch}, aten::ScalarType::Int, q.device())};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> zipvl_attn(const Tensor& q, const Tensor& k, const Tensor& v, double tau,
                                              std::optional<double> ratio, std::int64_t num_recent,
                                              std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent,
                                              std::int64_t min_tokens, bool all_queries, std::optional<double> scale,
                                              bool causal, const std::optional<Tensor>& keep_mask,
                                              const std::optional<Tensor>& token_mask) {
  const auto sizes = checks::layer("zipvl_attn", q, k, v, tau, ratio, num_recent, num_random, seed, keep_recent,
                                   min_tokens, scale, keep_mask, token_mask);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return nothing(sizes, q);
  }
  const Pair selection = important_tokens(q, k, tau, ratio, num_recent, num_random, seed, keep_recent, min_tokens,
                                          scale, causal, keep_mask, token_mask);
  const Tensor out = attend(q, k, v, selection, all_queries, scale, causal, token_mask);
  return {out, std::get<0>(selection), std::get<1>(selection)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zipvl_prefill(
    const Tensor& q, const Tensor& k, const Tensor& v, double tau, std::optional<double> ratio, std::int64_t num_recent,
    std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent, std::int64_t min_tokens, bool all_queries,
    std::optional<double> scale, bool causal, const std::optional<Tensor>& keep_mask,
    const std::optional<Tensor>& token_mask, double dense_above) {
  const auto sizes = checks::layer("zipvl_prefill", q, k, v, tau, ratio, num_recent, num_random, seed, keep_recent,
                                   min_tokens, scale, keep_mask, token_mask, dense_above);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    const auto [out, index, count] = nothing(sizes, q);
    const auto [k_packed, v_packed] = aten::call<Pair>("zipvl::pack_kv", "", k, v, index, count);
    return {out, index, count, k_packed, v_packed};
  }
  Pair selection = important_tokens(q, k, tau, ratio, num_recent, num_random, seed, keep_recent, min_tokens, scale,
                                    causal, keep_mask, token_mask);
  if (dense_above < 1.0) {
    selection = aten::widen_selection(std::get<0>(selection), std::get<1>(selection), dense_above, token_mask);
  }
  const auto& [index, count] = selection;
  const Tensor out = attend(q, k, v, selection, all_queries, scale, causal, token_mask);
  const auto [k_packed, v_packed] = aten::call<Pair>("zipvl::pack_kv", "", k, v, index, count);
  return {out, index, count, k_packed, v_packed};
}

}  // namespace zipvl::ops
