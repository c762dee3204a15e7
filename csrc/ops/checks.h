// Argument checks that ops share, made before anything is computed. Each message names the op, the argument, what was
// expected and what came. The check of a whole op stands in the op's file.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/quantized_block.h"
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

// The sizes every later step needs, read off checked tensors: `queries` are the last of `tokens`.
struct AttentionSizes {
  std::int64_t batch, query_heads, kv_heads, queries, tokens, head_dim;
};

// ---- one argument
std::string shape_text(const Tensor& tensor);
void rank(const char* op, Named argument, std::int64_t expected, const char* layout);
void shape(const char* op, Named argument, std::initializer_list<std::int64_t> expected);
void dtype(const char* op, Named argument, ScalarType expected);
void floating(const char* op, Named argument);  // float16, bfloat16 or float32
void unit_last_stride(const char* op, Named argument);
void same_device(const char* op, const Tensor& like, Named argument);
void same_dtype(const char* op, Named expected, Named argument);
void not_negative(const char* op, std::initializer_list<std::pair<const char*, std::int64_t>> arguments);
void share(const char* op, const char* name, double value);  // in (0, 1]
void scale(const char* op, std::optional<double> value);     // finite

// An int32 vector [size] on the device of `like`: a count, or lengths.
void int_vector(const char* op, const Tensor& like, Named argument, std::int64_t size);

// A bool [B, N] mask on the device of `like`; absent is fine.
void mask(const char* op, const char* name, const std::optional<Tensor>& mask, const Tensor& like, std::int64_t batch,
          std::int64_t tokens);

// ---- arguments that belong together
// q [B, Hq, N, D] of a supported dtype, unit last stride.
void query(const char* op, const Tensor& q);

// q and k (and v, when given) as attention inputs: matching batch, head dim, dtype, device; Hq % Hkv == 0.
AttentionSizes attention_inputs(const char* op, const Tensor& q, Named k, std::optional<Named> v);

// The heads of `kv` divide q's.
void heads_divide(const char* op, const char* kv, std::int64_t kv_heads, std::int64_t query_heads);

// q has `expected` tokens: one when decoding.
void query_tokens(const char* op, const Tensor& q, std::int64_t expected);

// The tokens of `rows` (its dim `dim`) are the last of k's `tokens`; fewer need causal.
void last_tokens(const char* op, Named rows, std::int64_t dim, std::int64_t tokens, bool causal);

// local_window and num_sinks: not negative, and sinks with a window alone.
void neighbourhood(const char* op, std::int64_t local_window, std::int64_t num_sinks);

// Windows and last_key: under causal alone. last_key is int32 [B, n]; absent is fine.
void needs_causal(const char* op, bool causal, std::int64_t local_window);
void last_key(const char* op, const std::optional<Tensor>& last_key, const Tensor& like, std::int64_t batch,
              std::int64_t queries, bool causal);

void kv_pair(const char* op, Named k, Named v);

// index [B, N] and count [B], int32, on the device of `like`.
void selection(const char* op, const Tensor& like, const Tensor& index, const Tensor& count, std::int64_t batch,
               std::int64_t tokens);

// Two [B, N] float32 scores.
void scores(const char* op, const Tensor& budget_score, const Tensor& rank_score);

// The arguments that say how many tokens are kept.
void budget(const char* op, double tau, std::optional<double> ratio, std::int64_t min_tokens);

void probe_counts(const char* op, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed);

// x [B, N, C] and weight [O, C] of a linear layer.
void linear(const char* op, Named x, Named weight);

// The steps between a linear layer [Hq * D, C] and queries; the names are the op's own.
struct QueryProjection {
  Named x, weight;
  const char* bias_name;
  const std::optional<Tensor>& bias;
  Named cos, sin;
  const char* norm_weight_name;
  const std::optional<Tensor>& norm_weight;
  const char* norm_eps_name;
  double norm_eps;
};
void query_projection(const char* op, const QueryProjection& given);

// ---- quantised caches
// [bits of keys, bits of values] of a segment: one of quantized::kSupportedBits.
quantized::Bits bits(const char* op, const char* name, const std::vector<std::int64_t>& given);
void quantized_head_dim(const char* op, Named argument);

// v_factor [B, Hkv, D] float32, for tensors like `like` [B, H, N, D].
void value_factor(const char* op, const Tensor& v_factor, const Tensor& like, std::int64_t kv_heads);

}  // namespace zipvl::checks
