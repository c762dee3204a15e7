// probe_scores: what the probes attend to, as one score a token (docs/ops.md, step 2).
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace {

constexpr const char* kOp = "probe_scores";

checks::AttentionSizes check(const ops::ProbeScoresArgs& args) {
  const auto sizes = checks::attention_inputs(kOp, args.q, {"k", args.k}, std::nullopt);
  checks::last_tokens(kOp, {"q", args.q}, 2, sizes.tokens, args.causal);
  const checks::Named probes{"probe_index", args.probe_index};
  checks::dtype(kOp, probes, checks::ScalarType::Int);
  checks::rank(kOp, probes, 2, "[B, P]");
  checks::shape(kOp, probes, {sizes.batch, args.probe_index.size(1)});
  checks::same_device(kOp, args.q, probes);
  if (args.probe_index.size(1) == 0) {
    checks::fail(kOp, "probe_index must have at least 1 probe, got shape ", checks::shape_text(args.probe_index));
  }
  checks::scale(kOp, args.scale);
  checks::mask(kOp, "token_mask", args.token_mask, args.q, sizes.batch, sizes.tokens);
  checks::last_key(kOp, args.last_key, args.q, sizes.batch, sizes.queries, args.causal);
  return sizes;
}

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

// Without what the plan says.
ProbeScoresParams make_params(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                              std::int64_t probes, double scale, bool causal, const ops::OptionalTensor& token_mask,
                              const ops::OptionalTensor& last_key) {
  ProbeScoresParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  copy_strides(q, params.q_stride);
  copy_strides(k, params.k_stride);
  params.token_mask = optional_matrix<bool>(token_mask, params.mask_stride);
  params.last_key = optional_matrix<std::int32_t>(last_key, params.last_key_stride);
  params.first_query = static_cast<int>(sizes.tokens - sizes.queries);
  params.element = element_of(q);
  params.head_dim = static_cast<int>(sizes.head_dim);
  params.batch = static_cast<int>(sizes.batch);
  params.query_heads = static_cast<int>(sizes.query_heads);
  params.kv_heads = static_cast<int>(sizes.kv_heads);
  params.tokens = static_cast<int>(sizes.tokens);
  params.probes = static_cast<int>(probes);
  params.causal = causal;
  params.negate = scale < 0.0;
  // Not 0, of which -inf, a hidden score, would make NaN.
  params.scale_log2 =
      std::max(static_cast<float>(std::fabs(scale) * std::numbers::log2e), std::numeric_limits<float>::min());
  params.num_sms = num_sms(q.get_device_index());
  return params;
}

}  // namespace

ProbeScoresStep probe_scores_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                                  std::int64_t probes, double scale, bool causal, const ops::OptionalTensor& token_mask,
                                  const ops::OptionalTensor& last_key) {
  ProbeScoresStep step{};
  step.family = KernelFamily::kSm80;
  step.params = make_params(sizes, q, k, probes, scale, causal, token_mask, last_key);
#ifdef ZIPVL_HAS_SM90
  if (kernel_family(q.get_device_index()) == KernelFamily::kSm90 && probe_scores_fits_sm90(step.params)) {
    step.launch = &launch_probe_scores_sm90;
    step.family = KernelFamily::kSm90;
  }
#endif
  const bool clusters = step.family == KernelFamily::kSm90;
  if (!clusters && probe_scores_fits_sm80(step.params)) {
    step.launch = &launch_probe_scores_sm80;
  }
  step.plan = plan::plan_probe_scores_cuda({sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens, probes,
                                            sizes.head_dim, token_mask.has_value(), clusters, is_half(q),
                                            step.launch != nullptr});
  if (!step.plan.reason.empty()) {
    step.launch = nullptr;
    return step;
  }
  take_plan(step.params, step.plan);
  return step;
}

namespace {

ops::Implementation explain(const Tensor& q) {
  const auto step = probe_scores_step(sizes_like(q), q, q, /*probes=*/128, 1.0, true, std::nullopt, std::nullopt);
  return implementation_of(step.family, step.plan.reason);
}

// Nothing where no kernel takes these inputs.
std::optional<ops::TensorPair> run(const ops::ProbeScoresArgs& args, const checks::AttentionSizes& sizes) {
  const DeviceGuard guard(args.q.get_device_index());
  auto [plan, params, launch, family] =
      probe_scores_step(sizes, args.q, args.k, args.probe_index.size(1),
                        ops::scale_or_default(args.scale, sizes.head_dim), args.causal, args.token_mask, args.last_key);
  if (launch == nullptr) {
    return std::nullopt;
  }
  params.probe_index = matrix<std::int32_t>(args.probe_index, params.probe_stride);
  const Tensor workspace = empty({plan.workspace.bytes}, ScalarType::Byte, args.q);
  place_workspace(params, plan.workspace, workspace.mutable_data_ptr<std::uint8_t>());
  const Tensor accumulated = empty({sizes.batch, sizes.tokens}, ScalarType::Float, args.q);
  const Tensor normalized = empty({sizes.batch, sizes.tokens}, ScalarType::Float, args.q);
  params.accumulated = accumulated.mutable_data_ptr<float>();
  params.normalized = normalized.mutable_data_ptr<float>();
  check_launch(kOp, launch(params, stream_of(args.q)));
  return ops::TensorPair{accumulated, normalized};
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

TensorPair probe_scores(const ProbeScoresArgs& args) {
  const auto sizes = check(args);
  if (sizes.batch == 0 || sizes.queries == 0) {
    const aten::Sizes shape{sizes.batch, sizes.tokens};
    return {aten::zeros(shape, aten::ScalarType::Float, args.q.device()),
            aten::zeros(shape, aten::ScalarType::Float, args.q.device())};
  }
#ifdef ZIPVL_CUDA_OPS
  if (auto result = cuda::run(args, sizes)) {
    return *result;
  }
#endif
  return cpu::probe_scores(args);
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(probe_scores,
         "(Tensor q, Tensor k, Tensor probe_index, *, float? scale=None, bool causal=True, Tensor? token_mask=None, "
         "Tensor? last_key=None) -> (Tensor accumulated, Tensor normalized)",
         &zipvl::cuda::explain)
