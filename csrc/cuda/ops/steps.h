// The steps of the layer, as the ops and zipvl_attn share them: parameters made of checked tensors, and launches that
// allocate nothing. Workspaces and results are given as addresses.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "cuda/ops/device.h"
#include "cuda/pack_kv/pack_kv.h"
#include "cuda/probe_index/params.h"
#include "cuda/probe_scores/plan.h"
#include "cuda/probe_scores/params.h"
#include "cuda/select_tokens/plan.h"
#include "cuda/select_tokens/params.h"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/plan.h"
#include "ops/checks.h"

namespace zipvl::cuda {

// Without `out` and `keep_from`.
ProbeIndexParams probe_index_params(const Tensor& q, std::int64_t num_recent, std::int64_t num_random,
                                    std::int64_t seed, const std::optional<Tensor>& token_mask);

struct ProbeScoresStep {
  using Launch = cudaError_t (*)(const ProbeScoresParams&, cudaStream_t);
  plan::ProbeScoresCudaPlan plan;
  ProbeScoresParams params;  // without probe_index, workspace and results
  Launch launch;             // null: no kernel takes these inputs, and the rest is undefined
};

ProbeScoresStep probe_scores_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                                  std::int64_t probes, double scale, bool causal,
                                  const std::optional<Tensor>& token_mask);

// What a device offers to select_tokens.
plan::SelectTokensPlan select_tokens_plan(std::int64_t batch, std::int64_t tokens, int device);

// Without scores, keep_from, results and workspace.
SelectTokensParams select_tokens_params(std::int64_t batch, std::int64_t tokens, const plan::SelectTokensPlan& plan,
                                        double tau, std::optional<double> ratio, std::int64_t min_tokens,
                                        const std::optional<Tensor>& keep_mask,
                                        const std::optional<Tensor>& token_mask);

cudaError_t launch_select_tokens(const SelectTokensParams& params, plan::SelectTeam team, cudaStream_t stream);

// k, v and their packed forms [B, H, capacity, D]; `packed_stride` of both. Without index and count.
PackKvParams pack_kv_params(const Tensor& k, const Tensor& v, void* k_packed, void* v_packed, std::int64_t capacity);

struct SparseAttnStep {
  plan::SparseAttnCudaPlan plan;  // kAten: no kernel takes these inputs, and the rest is undefined
  SparseAttnParams params;        // without index, count, out and the packed workspace
};

SparseAttnStep sparse_attn_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v,
                                double scale, bool causal, bool all_queries);

// Packs K and V where the kernel wants it, counts what each query sees where plan.seen_tokens asks for it, and attends.
// params is complete; `seen` is [B, N], or null where it is not asked for.
void launch_sparse_attn(const char* op, const SparseAttnParams& params, const plan::SparseAttnCudaPlan& plan,
                        std::int32_t* seen, int device, cudaStream_t stream);

}  // namespace zipvl::cuda
