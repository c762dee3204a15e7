// Steps 1 to 5 in one call. Each step goes through the dispatcher, so this file serves every device.
#include "aten/call.h"
#include "aten/kernels.h"
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> zipvl_attn(const Tensor& q, const Tensor& k, const Tensor& v, double tau,
                                              std::optional<double> ratio, std::int64_t num_recent,
                                              std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent,
                                              std::int64_t min_tokens, bool all_queries, std::optional<double> scale,
                                              bool causal, const std::optional<Tensor>& keep_mask,
                                              const std::optional<Tensor>& token_mask) {
  constexpr const char* kOp = "zipvl_attn";
  const auto sizes = checks::attention_inputs(kOp, q, {"k", k}, checks::Named{"v", v});
  checks::query_tokens(kOp, q, sizes.tokens);
  checks::budget(kOp, tau, ratio, min_tokens);
  checks::probe_counts(kOp, num_recent, num_random, seed);
  checks::not_negative(kOp, {{"keep_recent", keep_recent}});
  checks::scale(kOp, scale);
  checks::mask(kOp, "keep_mask", keep_mask, q, sizes.batch, sizes.tokens);
  checks::mask(kOp, "token_mask", token_mask, q, sizes.batch, sizes.tokens);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    const aten::Sizes shape{sizes.batch, sizes.tokens, sizes.query_heads, sizes.head_dim};
    return {aten::transpose(aten::empty(shape, q.scalar_type(), q.device()), 1, 2),
            aten::zeros({sizes.batch, sizes.tokens}, aten::ScalarType::Int, q.device()),
            aten::zeros({sizes.batch}, aten::ScalarType::Int, q.device())};
  }

  const Tensor probes = aten::call("zipvl::probe_index", "", q, num_recent, num_random, seed, token_mask);
  const auto [accumulated, normalized] =
      aten::call<Pair>("zipvl::probe_scores", "", q, k, probes, scale, causal, token_mask);
  const Tensor real = aten::real_tokens(token_mask, sizes.batch, sizes.tokens, q.device());
  const auto [index, count] = aten::call<Pair>("zipvl::select_tokens", "", accumulated, normalized, tau, ratio,
                                               min_tokens, tokens_to_keep(keep_mask, real, keep_recent), token_mask);
  const Tensor out = aten::call("zipvl::sparse_attn", "", q, k, v, index, count, scale, causal, all_queries);
  if (all_queries && token_mask) {
    const Tensor padding = aten::unsqueeze(aten::unsqueeze(aten::logical_not(*token_mask), 1), 3);
    aten::masked_fill_(out, padding, 0.0);
  }
  return {out, index, count};
}

}  // namespace zipvl::ops
