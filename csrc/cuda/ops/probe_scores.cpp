#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "cuda/ops/device.h"
#include "cuda/ops/ops.h"
#include "cuda/ops/steps.h"
#include "ops/aten.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::cuda {
namespace {

constexpr const char* kOp = "probe_scores";
constexpr std::int64_t kMaxBatches = 64;
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 20;

// The kernels' dtypes, head dimensions and sizes; the layout of k is the family's matter.
bool kernels_take(const checks::AttentionSizes& sizes, const Tensor& q, std::int64_t probes) {
  const auto type = q.scalar_type();
  const std::int64_t d = sizes.head_dim;
  return (type == aten::ScalarType::Half || type == aten::ScalarType::BFloat16) &&
         (d == 64 || d == 96 || d == 128 || d == 256) && probes <= plan::kProbeMaxProbes &&
         sizes.batch <= kMaxBatches && sizes.tokens <= kMaxTokens;
}

// Without what the plan says.
ProbeScoresParams make_params(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                              std::int64_t probes, double scale, bool causal, const std::optional<Tensor>& token_mask) {
  ProbeScoresParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  for (int d = 0; d < 3; ++d) {
    params.q_stride[d] = q.stride(d);
    params.k_stride[d] = k.stride(d);
  }
  if (token_mask) {
    params.token_mask = token_mask->const_data_ptr<bool>();
    params.mask_stride[0] = token_mask->stride(0);
    params.mask_stride[1] = token_mask->stride(1);
  }
  params.element = q.scalar_type() == aten::ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
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

// The device's family, where its copies can read k; null where none can.
ProbeScoresStep::Launch launch_for(const ProbeScoresParams& params, [[maybe_unused]] int device) {
#ifdef ZIPVL_HAS_SM90
  if (kernel_family(device) == KernelFamily::kSm90 && probe_scores_fits_sm90(params)) {
    return &launch_probe_scores_sm90;
  }
#endif
  return probe_scores_fits_sm80(params) ? &launch_probe_scores_sm80 : nullptr;
}

bool takes_clusters([[maybe_unused]] ProbeScoresStep::Launch launch) {
#ifdef ZIPVL_HAS_SM90
  return launch == &launch_probe_scores_sm90;
#else
  return false;
#endif
}

}  // namespace

ProbeScoresStep probe_scores_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                                  std::int64_t probes, double scale, bool causal,
                                  const std::optional<Tensor>& token_mask) {
  ProbeScoresStep step{};
  if (kernels_take(sizes, q, probes)) {
    step.params = make_params(sizes, q, k, probes, scale, causal, token_mask);
    step.launch = launch_for(step.params, q.get_device_index());
    step.plan = plan::plan_probe_scores_cuda({sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens, probes,
                                              sizes.head_dim, token_mask.has_value(), takes_clusters(step.launch)});
    take_plan(step.params, step.plan);
  }
  return step;
}

std::tuple<Tensor, Tensor> probe_scores(const Tensor& q, const Tensor& k, const Tensor& probe_index,
                                        std::optional<double> scale, bool causal,
                                        const std::optional<Tensor>& token_mask) {
  const auto sizes = checks::probe_scores(kOp, q, k, probe_index, scale, token_mask);
  const auto fallback = [&] { return ops::probe_scores(q, k, probe_index, scale, causal, token_mask); };
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return fallback();
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto [plan, params, launch] = probe_scores_step(sizes, q, k, probe_index.size(1),
                                                  ops::scale_or_default(scale, sizes.head_dim), causal, token_mask);
  if (launch == nullptr) {
    return fallback();
  }
  params.probe_index = probe_index.const_data_ptr<std::int32_t>();
  params.probe_stride[0] = probe_index.stride(0);
  params.probe_stride[1] = probe_index.stride(1);
  const Tensor workspace = aten::empty({plan.workspace.bytes}, aten::ScalarType::Byte, q.device());
  place_workspace(params, plan.workspace, workspace.mutable_data_ptr<std::uint8_t>());
  const Tensor accumulated = aten::empty({sizes.batch, sizes.tokens}, aten::ScalarType::Float, q.device());
  const Tensor normalized = aten::empty({sizes.batch, sizes.tokens}, aten::ScalarType::Float, q.device());
  params.accumulated = accumulated.mutable_data_ptr<float>();
  params.normalized = normalized.mutable_data_ptr<float>();
  check_launch(kOp, launch(params, stream_of(q)));
  return {accumulated, normalized};
}

}  // namespace zipvl::cuda
