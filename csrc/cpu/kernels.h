// What each op computes, over ATen, for tensors of any device; arguments are checked already and B, N > 0. On the CPU
// counts are read, so that work is proportional to what was selected; on any other device nothing is copied to the
// host: every place is computed and masked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/probe_scores_plan.h"
#include "cpu/sparse_attn_plan.h"

namespace zipvl::aten {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index, double scale,
                                        bool causal, const std::optional<Tensor>& token_mask,
                                        const plan::ProbeScoresPlan& plan);

std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask);

// A selection in which a row with more than `dense_above` of its real tokens has all of them.
std::tuple<Tensor, Tensor> widen_selection(const Tensor& index, const Tensor& count, double dense_above,
                                           const std::optional<Tensor>& token_mask);

std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count);

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   double scale, const plan::SparseAttnPlan& plan, bool causal, bool all_queries);

std::tuple<Tensor, Tensor> decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& lengths, double scale);

Tensor project_queries(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cos,
                       const Tensor& sin, const Tensor& index, const std::optional<Tensor>& count,
                       const std::optional<Tensor>& norm_weight, double norm_eps);

Tensor project_outputs(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count);

// token_mask, or every token when it is absent: [B, N] bool
Tensor real_tokens(const std::optional<Tensor>& token_mask, std::int64_t batch, std::int64_t tokens,
                   torch::stable::Device device);

// The `most` last real tokens of each row: [B, N] bool
Tensor last_real_tokens(const Tensor& real, std::int64_t most);

// Entry i of a 1-d int32 CPU tensor, clamped to [0, most].
std::int64_t host_count(const Tensor& counts, std::int64_t i, std::int64_t most);

}  // namespace zipvl::aten
