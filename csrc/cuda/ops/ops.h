// The ops that have native CUDA kernels: check, plan, allocate, launch; what a kernel does not take goes to zipvl::ops,
// which computes it over ATen on the GPU. Meanings and shapes: ops/ops.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace zipvl::cuda {

using torch::stable::Tensor;

Tensor probe_index(const Tensor& q, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                   const std::optional<Tensor>& token_mask);

std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index,
                                        std::optional<double> scale, bool causal,
                                        const std::optional<Tensor>& token_mask);

std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask);

std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count);

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   std::optional<double> scale, bool causal, bool all_queries);

std::tuple<Tensor, Tensor, Tensor> zipvl_attn(const Tensor& q, const Tensor& k, const Tensor& v, double tau,
                                              std::optional<double> ratio, std::int64_t num_recent,
                                              std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent,
                                              std::int64_t min_tokens, bool all_queries, std::optional<double> scale,
                                              bool causal, const std::optional<Tensor>& keep_mask,
                                              const std::optional<Tensor>& token_mask);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zipvl_prefill(
    const Tensor& q, const Tensor& k, const Tensor& v, double tau, std::optional<double> ratio, std::int64_t num_recent,
    std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent, std::int64_t min_tokens, bool all_queries,
    std::optional<double> scale, bool causal, const std::optional<Tensor>& keep_mask,
    const std::optional<Tensor>& token_mask, double dense_above);

Tensor project_queries(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cos,
                       const Tensor& sin, const Tensor& index, const std::optional<Tensor>& count,
                       const std::optional<Tensor>& norm_weight, double norm_eps);

Tensor project_outputs(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count);

std::tuple<Tensor, Tensor> decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& lengths, std::optional<double> scale);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, std::int64_t high_bits,
                                                               std::int64_t low_bits,
                                                               const std::optional<Tensor>& v_factor,
                                                               const std::optional<Tensor>& token_mask);

std::tuple<Tensor, Tensor> decode_attn_quantized(
    const Tensor& q, const Tensor& high, const Tensor& high_blocks, const Tensor& low, const Tensor& low_blocks,
    const Tensor& v_factor, std::int64_t high_bits, std::int64_t low_bits, const std::optional<Tensor>& k_recent,
    const std::optional<Tensor>& v_recent, const std::optional<Tensor>& recent_lengths, std::optional<double> scale);

}  // namespace zipvl::cuda
