// The ops, device by device the same functions: each checks its arguments, then runs on the tensors' device.
// On the CPU they are the implementation; on CUDA they are what runs where no native kernel does.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace zipvl::ops {

using torch::stable::Tensor;

// q [B, Hq, N, D]; token_mask [B, N] bool -> [B, num_recent + num_random] int32. CPU tensors only.
Tensor probe_index(const Tensor& q, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                   const std::optional<Tensor>& token_mask);

// q [B, Hq, N, D], k [B, Hkv, N, D], probe_index [B, P] int32 -> accumulated, normalized [B, N] float32
std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index,
                                        std::optional<double> scale, bool causal,
                                        const std::optional<Tensor>& token_mask);

// scores [B, N] float32, masks [B, N] bool -> index [B, N], count [B] int32
std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask);

// k, v [B, Hkv, N, D], index [B, N], count [B] int32 -> packed k, v [B, Hkv, N, D], rows >= count undefined
std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count);

// -> [B, Hq, N, D], the transposed view of a contiguous [B, N, Hq, D]
Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   std::optional<double> scale, bool causal, bool all_queries);

// The whole layer: the ops above, each through the dispatcher, so that a device's native kernels are found.
std::tuple<Tensor, Tensor, Tensor> zipvl_attn(const Tensor& q, const Tensor& k, const Tensor& v, double tau,
                                              std::optional<double> ratio, std::int64_t num_recent,
                                              std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent,
                                              std::int64_t min_tokens, bool all_queries, std::optional<double> scale,
                                              bool causal, const std::optional<Tensor>& keep_mask,
                                              const std::optional<Tensor>& token_mask);

// The same, and the packed k, v [B, Hkv, N, D] it attended to, rows >= count undefined. A row that selects more than
// `dense_above` of its real tokens selects all of them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zipvl_prefill(
    const Tensor& q, const Tensor& k, const Tensor& v, double tau, std::optional<double> ratio, std::int64_t num_recent,
    std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent, std::int64_t min_tokens, bool all_queries,
    std::optional<double> scale, bool causal, const std::optional<Tensor>& keep_mask,
    const std::optional<Tensor>& token_mask, double dense_above);

// q [B, Hq, 1, D], caches [B, Hkv, S, D], lengths [B] int32 -> out [B, Hq, 1, D], lse [B, Hq, 1] float32
std::tuple<Tensor, Tensor> decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& lengths, std::optional<double> scale);

// x [B, N, C], weight [Hq * D, C], bias [Hq * D], cos, sin [B or 1, N, D], index [B, M] int32, count [B] int32,
// norm_weight [D] -> q [B, Hq, N, D], the transposed view of a contiguous [B, N, Hq, D]; rows not named undefined
Tensor project_queries(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cos,
                       const Tensor& sin, const Tensor& index, const std::optional<Tensor>& count,
                       const std::optional<Tensor>& norm_weight, double norm_eps);

// x [B, N, C], weight [O, C], index [B, M], count [B] int32 -> [B, N, O], rows not named 0
Tensor project_outputs(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count);

// k, v [B, Hkv, N, D], index [B, N], count [B] int32, v_factor [B, Hkv, D] float32, token_mask [B, N] bool -> high
// [B, Hkv, ceil(N / 64) + 1, bytes] uint8, high_blocks [B] int32, low, low_blocks, v_factor. CPU tensors only.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, std::int64_t high_bits,
                                                               std::int64_t low_bits,
                                                               const std::optional<Tensor>& v_factor,
                                                               const std::optional<Tensor>& token_mask);

// q [B, Hq, 1, D], segments as quantize_kv gives them, k_recent, v_recent [B, Hkv, R, D], recent_lengths [B] int32 ->
// out [B, Hq, 1, D], lse [B, Hq, 1] float32. CPU tensors only.
std::tuple<Tensor, Tensor> decode_attn_quantized(
    const Tensor& q, const Tensor& high, const Tensor& high_blocks, const Tensor& low, const Tensor& low_blocks,
    const Tensor& v_factor, std::int64_t high_bits, std::int64_t low_bits, const std::optional<Tensor>& k_recent,
    const std::optional<Tensor>& v_recent, const std::optional<Tensor>& recent_lengths, std::optional<double> scale);

}  // namespace zipvl::ops
