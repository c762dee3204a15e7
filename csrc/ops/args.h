// The arguments of ops that call one another, a struct each in the order of the schema, and what an absent one means.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "ops/register.h"

namespace zipvl::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

struct ProbeIndexArgs {
  Tensor q;
  std::int64_t num_recent, num_random, seed;
  OptionalTensor token_mask, k = std::nullopt;  // k: of all tokens, of which q's are the last
  static ProbeIndexArgs read(Arguments& in) {
    return {in.tensor(), in.integer(), in.integer(), in.integer(), in.optional_tensor(), in.optional_tensor()};
  }
};

struct ProbeScoresArgs {
  Tensor q, k, probe_index;
  std::optional<double> scale;
  bool causal;
  OptionalTensor token_mask, last_key = std::nullopt;
  static ProbeScoresArgs read(Arguments& in) {
    return {in.tensor(), in.tensor(),          in.tensor(),         in.optional_real(),
            in.flag(),   in.optional_tensor(), in.optional_tensor()};
  }
};

struct SelectTokensArgs {
  Tensor budget_score, rank_score;
  double tau;
  std::optional<double> ratio;
  std::int64_t min_tokens;
  OptionalTensor keep_mask, token_mask;
  std::int64_t local_window = 0, num_sinks = 0;
  OptionalTensor extra_mask = std::nullopt;
  double max_ratio = 1.0;
  // Whether T gains tokens on top of its budget.
  bool extends() const { return local_window > 0 || num_sinks > 0 || extra_mask; }
  static SelectTokensArgs read(Arguments& in) {
    return {in.tensor(),          in.tensor(),  in.real(),    in.optional_real(),   in.integer(), in.optional_tensor(),
            in.optional_tensor(), in.integer(), in.integer(), in.optional_tensor(), in.real()};
  }
};

struct PackKvArgs {
  Tensor k, v, index, count;
  static PackKvArgs read(Arguments& in) { return {in.tensor(), in.tensor(), in.tensor(), in.tensor()}; }
};

struct PackPagedArgs {
  Tensor k, v, index, count, block_table, k_cache, v_cache;
  OptionalTensor capacity, first_slot;
  static PackPagedArgs read(Arguments& in) {
    return {in.tensor(), in.tensor(), in.tensor(),          in.tensor(),         in.tensor(),
            in.tensor(), in.tensor(), in.optional_tensor(), in.optional_tensor()};
  }
};

struct SparseAttnArgs {
  Tensor q, k, v, index, count;
  std::optional<double> scale;
  bool causal, all_queries;
  OptionalTensor token_mask = std::nullopt;
  std::int64_t local_window = 0, num_sinks = 0;
  OptionalTensor last_key = std::nullopt;
  static SparseAttnArgs read(Arguments& in) {
    return {in.tensor(), in.tensor(), in.tensor(),          in.tensor(),  in.tensor(),  in.optional_real(),
            in.flag(),   in.flag(),   in.optional_tensor(), in.integer(), in.integer(), in.optional_tensor()};
  }
};

struct ProjectQueriesArgs {
  Tensor x, weight;
  OptionalTensor bias;
  Tensor cos, sin, index;
  OptionalTensor count, norm_weight;
  double norm_eps;
  static ProjectQueriesArgs read(Arguments& in) {
    return {in.tensor(), in.tensor(),          in.optional_tensor(), in.tensor(), in.tensor(),
            in.tensor(), in.optional_tensor(), in.optional_tensor(), in.real()};
  }
};

struct ProjectOutputsArgs {
  Tensor x, weight, index, count;
  static ProjectOutputsArgs read(Arguments& in) { return {in.tensor(), in.tensor(), in.tensor(), in.tensor()}; }
};

// How much is kept, and how it is attended to: the keywords of zipvl_attn, zipvl_prefill and zipvl_layer.
struct LayerOptions {
  double tau;
  std::optional<double> ratio;
  std::int64_t num_recent, num_random, seed, keep_recent, min_tokens;
  bool all_queries;
  std::optional<double> scale;
  bool causal;
  OptionalTensor keep_mask, token_mask;
  std::int64_t local_window, num_sinks;
  OptionalTensor extra_mask, last_key;
  double max_ratio;
  static LayerOptions read(Arguments& in) {
    return {in.real(),          in.optional_real(), in.integer(),         in.integer(),
            in.integer(),       in.integer(),       in.integer(),         in.flag(),
            in.optional_real(), in.flag(),          in.optional_tensor(), in.optional_tensor(),
            in.integer(),       in.integer(),       in.optional_tensor(), in.optional_tensor(),
            in.real()};
  }
};

// From hidden states to queries, and from attention outputs to the layer's. All absent: queries are given.
struct LayerProjections {
  OptionalTensor hidden, q_weight, q_bias, q_norm_weight;
  double q_norm_eps = 0.0;
  OptionalTensor cos, sin, o_weight;
  static LayerProjections read(Arguments& in) {
    return {in.optional_tensor(), in.optional_tensor(), in.optional_tensor(), in.optional_tensor(), in.real(),
            in.optional_tensor(), in.optional_tensor(), in.optional_tensor()};
  }
};

struct LayerArgs {
  OptionalTensor q;
  Tensor k, v;
  LayerProjections projections;
  OptionalTensor budget_score, rank_score;  // given: no probes are drawn
  LayerOptions options;
  bool pack;
  static LayerArgs read(Arguments& in) {
    return {in.optional_tensor(),
            in.tensor(),
            in.tensor(),
            LayerProjections::read(in),
            in.optional_tensor(),
            in.optional_tensor(),
            LayerOptions::read(in),
            in.flag()};
  }
};

// The ops that the layer is made of. Each checks its arguments and runs on the tensors' device.
Tensor probe_index(const ProbeIndexArgs& args);
TensorPair probe_scores(const ProbeScoresArgs& args);
TensorPair select_tokens(const SelectTokensArgs& args);
TensorPair pack_kv(const PackKvArgs& args);
Tensor sparse_attn(const SparseAttnArgs& args);
Tensor project_queries(const ProjectQueriesArgs& args);
Tensor project_outputs(const ProjectOutputsArgs& args);

inline double scale_or_default(std::optional<double> scale, std::int64_t head_dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(head_dim));
}

// Threads that work on tensors of q's device can be split over.
inline std::int64_t host_threads(const Tensor& q) {
  return q.is_cpu() ? static_cast<std::int64_t>(torch::stable::get_num_threads()) : 1;
}

}  // namespace zipvl::ops
