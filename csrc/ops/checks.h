// Argument checks, all made before anything is computed. Each message names the op, the argument, what was expected
// and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <utility>

#include "common/text.h"

namespace zipvl::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  throw std::runtime_error(join(op, ": ", parts...));
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

// The sizes every later step needs, read off checked tensors.
struct AttentionSizes {
  std::int64_t batch, query_heads, kv_heads, tokens, head_dim;
};

// q [B, Hq, N, D] of a supported dtype, unit last stride.
void query(const char* op, const Tensor& q);

// q and k (and v, when given) as attention inputs: matching batch, tokens, head dim, dtype, device; Hq % Hkv == 0.
AttentionSizes attention_inputs(const char* op, const Tensor& q, Named k, std::optional<Named> v);

// q has `expected` tokens: as many as k, or one when decoding.
void query_tokens(const char* op, const Tensor& q, std::int64_t expected);

// k and v alone (pack_kv).
void kv_pair(const char* op, Named k, Named v);

// index [B, N] and count [B], int32, on the device of `like`.
void selection(const char* op, const Tensor& like, const Tensor& index, const Tensor& count, std::int64_t batch,
               std::int64_t tokens);

// probe_index [B, P] int32, P > 0.
void probes(const char* op, const Tensor& q, const Tensor& probe_index);

// lengths [B] int32.
void lengths(const char* op, const Tensor& q, const Tensor& lengths);

// Two [B, N] float32 scores.
void scores(const char* op, const Tensor& budget_score, const Tensor& rank_score);

// The arguments that say how many tokens are kept.
void budget(const char* op, double tau, std::optional<double> ratio, std::int64_t min_tokens);

// Every argument of probe_scores.
AttentionSizes probe_scores(const char* op, const Tensor& q, const Tensor& k, const Tensor& probe_index,
                            std::optional<double> scale, const std::optional<Tensor>& token_mask);

// Every argument of probe_index.
void probe_index(const char* op, const Tensor& q, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                 const std::optional<Tensor>& token_mask);

// Every tensor and number of sparse_attn.
AttentionSizes sparse_attn(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index,
                           const Tensor& count, std::optional<double> scale);

// Every argument of select_tokens.
void select_tokens(const char* op, const Tensor& budget_score, const Tensor& rank_score, double tau,
                   std::optional<double> ratio, std::int64_t min_tokens, const std::optional<Tensor>& keep_mask,
                   const std::optional<Tensor>& token_mask);

// Every argument of pack_kv.
void pack_kv(const char* op, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count);

// Every argument of decode_attn; `tokens` of the sizes is the number of slots.
AttentionSizes decode_attn(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                           const Tensor& lengths, std::optional<double> scale);

// Every argument of quantize_kv.
void quantize_kv(const char* op, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                 std::int64_t high_bits, std::int64_t low_bits, const std::optional<Tensor>& v_factor,
                 const std::optional<Tensor>& token_mask);

// Every argument of decode_attn_quantized; `tokens` of the sizes is 1.
AttentionSizes decode_attn_quantized(const char* op, const Tensor& q, const Tensor& high, const Tensor& high_blocks,
                                     const Tensor& low, const Tensor& low_blocks, const Tensor& v_factor,
                                     std::int64_t high_bits, std::int64_t low_bits,
                                     const std::optional<Tensor>& k_recent, const std::optional<Tensor>& v_recent,
                                     const std::optional<Tensor>& recent_lengths, std::optional<double> scale);

// Every argument of zipvl_attn. `dense_above` is zipvl_prefill's; 1 asks nothing.
AttentionSizes layer(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double tau,
                     std::optional<double> ratio, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                     std::int64_t keep_recent, std::int64_t min_tokens, std::optional<double> scale,
                     const std::optional<Tensor>& keep_mask, const std::optional<Tensor>& token_mask,
                     double dense_above = 1.0);

// Every argument of project_queries.
void project_queries(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& cos, const Tensor& sin, const Tensor& index, const std::optional<Tensor>& count,
                     const std::optional<Tensor>& norm_weight, double norm_eps);

// Every argument of project_outputs.
void project_outputs(const char* op, const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count);

// A bool [B, N] mask on the device of `like`; absent is fine.
void mask(const char* op, const char* name, const std::optional<Tensor>& mask, const Tensor& like, std::int64_t batch,
          std::int64_t tokens);

void shape(const char* op, Named argument, std::initializer_list<std::int64_t> expected);
void dtype(const char* op, Named argument, ScalarType expected);
void same_device(const char* op, const Tensor& like, Named argument);
void not_negative(const char* op, std::initializer_list<std::pair<const char*, std::int64_t>> arguments);
void probe_counts(const char* op, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed);
void scale(const char* op, std::optional<double> value);  // finite

}  // namespace zipvl::checks
