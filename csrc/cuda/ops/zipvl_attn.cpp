// The layer as one sequence of kernels: checked once, planned once, one workspace, and nothing between the launches but
// the stream. What a kernel does not take goes to zipvl::ops, which calls the ops one by one.
#include "cuda/layer/zero_padding.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "cuda/layer/plan.h"
#include "cuda/ops/ops.h"
#include "cuda/ops/steps.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::cuda {
namespace {

// The arguments of zipvl_attn and zipvl_prefill.
struct LayerCall {
  const char* op;
  const Tensor &q, &k, &v;
  double tau;
  std::optional<double> ratio;
  std::int64_t num_recent, num_random, seed, keep_recent, min_tokens;
  bool all_queries;
  std::optional<double> scale;
  bool causal;
  const std::optional<Tensor>&keep_mask, &token_mask;
  double dense_above;
};

struct LayerResult {
  Tensor out, index, count;
  std::optional<Tensor> k_packed, v_packed;  // where they were asked for
};

struct Steps {
  ProbeScoresStep scores;
  plan::SelectTokensPlan select;
  SparseAttnStep attention;
  plan::ZipvlAttnPlan plan;
};

std::optional<Steps> plan_steps(const LayerCall& call, const checks::AttentionSizes& sizes, bool returns_packed) {
  const std::int64_t probes = call.num_recent + call.num_random;
  const double scale = ops::scale_or_default(call.scale, sizes.head_dim);
  Steps steps{probe_scores_step(sizes, call.q, call.k, probes, scale, call.causal, call.token_mask), {}, {}, {}};
  if (steps.scores.launch == nullptr) {
    return std::nullopt;
  }
  steps.select = select_tokens_plan(sizes.batch, sizes.tokens, call.q.get_device_index());
  steps.attention = sparse_attn_step(sizes, call.q, call.k, call.v, scale, call.causal, call.all_queries);
  steps.plan = plan::plan_zipvl_attn(
      {sizes.batch, sizes.kv_heads, sizes.tokens, sizes.head_dim, probes, call.token_mask.has_value(), returns_packed},
      steps.scores.plan, steps.select, steps.attention.plan);
  return steps.plan.native ? std::optional(steps) : std::nullopt;
}

// Steps 1 to 4. `space`: the workspace.
void launch_selection(const LayerCall& call, const checks::AttentionSizes& sizes, Steps& steps, unsigned char* space,
                      const LayerResult& result, cudaStream_t stream) {
  const plan::ZipvlAttnWorkspace& at = steps.plan.workspace;
  const auto words = [space](std::int64_t offset) { return reinterpret_cast<std::int32_t*>(space + offset); };
  const auto row = [space](std::int64_t offset) { return reinterpret_cast<float*>(space + offset); };

  ProbeScoresParams& scores = steps.scores.params;
  if (steps.plan.draws_ahead) {
    ProbeIndexParams draw = probe_index_params(call.q, call.num_recent, call.num_random, call.seed, call.token_mask);
    draw.out = words(at.probe_index);
    draw.keep_from = call.token_mask ? words(at.keep_from) : nullptr;
    draw.keep_recent = call.keep_recent;
    check_launch(call.op, launch_probe_index(draw, stream));
    scores.probe_index = draw.out;
    scores.probe_stride[0] = call.num_recent + call.num_random;
    scores.probe_stride[1] = 1;
  } else {
    scores.draw = draw_probes(sizes.tokens, call.num_recent, call.num_random, static_cast<std::uint64_t>(call.seed));
  }
  if (!steps.plan.selects_sums) {
    scores.accumulated = row(at.accumulated);
    scores.normalized = row(at.normalized);
  }
  place_workspace(scores, steps.scores.plan.workspace, space + at.probe_scores);
  check_launch(call.op, steps.scores.launch(scores, stream));

  SelectTokensParams select = select_tokens_params(sizes.batch, sizes.tokens, steps.select, call.tau, call.ratio,
                                                   call.min_tokens, call.keep_mask, call.token_mask);
  select.budget_score = scores.accumulated;
  select.rank_score = scores.normalized;
  select.budget_stride[0] = select.rank_stride[0] = sizes.tokens;
  select.budget_stride[1] = select.rank_stride[1] = 1;
  select.keep_from = call.token_mask ? words(at.keep_from) : nullptr;
  select.keep_last = static_cast<int>(std::min(call.keep_recent, sizes.tokens));
  select.index = result.index.mutable_data_ptr<std::int32_t>();
  select.count = result.count.mutable_data_ptr<std::int32_t>();
  select.workspace = steps.select.workspace_bytes > 0 ? space + at.select_tokens : nullptr;
#ifdef ZIPVL_HAS_SM90
  if (steps.plan.selects_sums) {
    check_launch(call.op, launch_select_sums(select, scores, stream));
    return;
  }
#endif
  check_launch(call.op, launch_select_tokens(select, steps.select.team, stream));
}

// Step 5, and the packed keys and values as results where they are asked for.
void launch_attention(const LayerCall& call, const checks::AttentionSizes& sizes, Steps& steps, unsigned char* space,
                      const LayerResult& result, int device, cudaStream_t stream) {
  const plan::ZipvlAttnWorkspace& at = steps.plan.workspace;
  SparseAttnParams& params = steps.attention.params;
  params.out = result.out.mutable_data_ptr();
  params.index = result.index.const_data_ptr<std::int32_t>();
  params.index_stride[0] = sizes.tokens;
  params.index_stride[1] = 1;
  params.count = result.count.const_data_ptr<std::int32_t>();
  params.count_stride = 1;
  params.capacity = sizes.tokens;  // the copy engine reads rows past it as 0
  params.k_packed = result.k_packed ? result.k_packed->mutable_data_ptr() : space + at.k_packed;
  params.v_packed = result.v_packed ? result.v_packed->mutable_data_ptr() : space + at.v_packed;
  if (result.k_packed && steps.attention.plan.kernel == plan::SparseAttnKernel::kSm80) {  // does not pack by itself
    PackKvParams pack = pack_kv_params(call.k, call.v, params.k_packed, params.v_packed, params.capacity);
    pack.index = params.index;
    pack.index_stride[0] = params.index_stride[0];
    pack.index_stride[1] = params.index_stride[1];
    pack.count = params.count;
    pack.count_stride = params.count_stride;
    check_launch(call.op, launch_pack_kv(pack, stream));
  }
  launch_sparse_attn(call.op, params, steps.attention.plan, reinterpret_cast<std::int32_t*>(space + at.seen), device,
                     stream);
  if (call.all_queries && call.token_mask) {
    ZeroPaddingParams padding{};
    padding.out = params.out;
    padding.token_mask = call.token_mask->const_data_ptr<bool>();
    padding.mask_stride[0] = call.token_mask->stride(0);
    padding.mask_stride[1] = call.token_mask->stride(1);
    padding.batch = sizes.batch;
    padding.tokens = sizes.tokens;
    padding.row_bytes = sizes.query_heads * sizes.head_dim * static_cast<std::int64_t>(call.q.element_size());
    check_launch(call.op, launch_zero_padding(padding, stream));
  }
}

// Nothing where a step has no kernel for these inputs.
std::optional<LayerResult> run(const LayerCall& call, bool returns_packed) {
  const auto sizes =
      checks::layer(call.op, call.q, call.k, call.v, call.tau, call.ratio, call.num_recent, call.num_random, call.seed,
                    call.keep_recent, call.min_tokens, call.scale, call.keep_mask, call.token_mask, call.dense_above);
  if (sizes.batch == 0 || sizes.tokens == 0 || call.dense_above < 1.0) {
    return std::nullopt;
  }
  const int device = call.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::optional<Steps> steps = plan_steps(call, sizes, returns_packed);
  if (!steps) {
    return std::nullopt;
  }
  const Tensor& q = call.q;
  const auto [B, Hq, Hkv, N, D] = sizes;
  LayerResult result{empty_attention_output(q), empty_strided({B, N}, {N, 1}, ScalarType::Int, q),
                     empty_strided({B}, {1}, ScalarType::Int, q), std::nullopt, std::nullopt};
  if (returns_packed) {
    result.k_packed = empty_strided({B, Hkv, N, D}, {Hkv * N * D, N * D, D, 1}, q.scalar_type(), q);
    result.v_packed = empty_strided({B, Hkv, N, D}, {Hkv * N * D, N * D, D, 1}, q.scalar_type(), q);
  }
  const Tensor workspace = empty_strided({steps->plan.workspace.bytes}, {1}, ScalarType::Byte, q);
  unsigned char* space = workspace.mutable_data_ptr<std::uint8_t>();
  const cudaStream_t stream = stream_of(q);
  launch_selection(call, sizes, *steps, space, result, stream);
  launch_attention(call, sizes, *steps, space, result, device, stream);
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> zipvl_attn(const Tensor& q, const Tensor& k, const Tensor& v, double tau,
                                              std::optional<double> ratio, std::int64_t num_recent,
                                              std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent,
                                              std::int64_t min_tokens, bool all_queries, std::optional<double> scale,
                                              bool causal, const std::optional<Tensor>& keep_mask,
                                              const std::optional<Tensor>& token_mask) {
  const LayerCall call{"zipvl_attn", q,          k,           v,     tau,    ratio,     num_recent, num_random, seed,
                       keep_recent,  min_tokens, all_queries, scale, causal, keep_mask, token_mask, 1.0};
  if (const auto result = run(call, /*returns_packed=*/false)) {
    return {result->out, result->index, result->count};
  }
  return ops::zipvl_attn(q, k, v, tau, ratio, num_recent, num_random, seed, keep_recent, min_tokens, all_queries, scale,
                         causal, keep_mask, token_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zipvl_prefill(
    const Tensor& q, const Tensor& k, const Tensor& v, double tau, std::optional<double> ratio, std::int64_t num_recent,
    std::int64_t num_random, std::int64_t seed, std::int64_t keep_recent, std::int64_t min_tokens, bool all_queries,
    std::optional<double> scale, bool causal, const std::optional<Tensor>& keep_mask,
    const std::optional<Tensor>& token_mask, double dense_above) {
  const LayerCall call{"zipvl_prefill", q,          k,           v,     tau,    ratio,     num_recent, num_random, seed,
                       keep_recent,     min_tokens, all_queries, scale, causal, keep_mask, token_mask, dense_above};
  if (const auto result = run(call, /*returns_packed=*/true)) {
    return {result->out, result->index, result->count, *result->k_packed, *result->v_packed};
  }
  return ops::zipvl_prefill(q, k, v, tau, ratio, num_recent, num_random, seed, keep_recent, min_tokens, all_queries,
                            scale, causal, keep_mask, token_mask, dense_above);
}

}  // namespace zipvl::cuda
