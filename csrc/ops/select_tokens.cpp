// select_tokens: how many tokens matter, and which (docs/ops.md, steps 3 and 4).
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include <algorithm>

#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace {

constexpr const char* kOp = "select_tokens";

void check(const ops::SelectTokensArgs& args) {
  checks::scores(kOp, args.budget_score, args.rank_score);
  checks::budget(kOp, args.tau, args.ratio, args.min_tokens);
  const std::int64_t batch = args.budget_score.size(0), tokens = args.budget_score.size(1);
  checks::mask(kOp, "keep_mask", args.keep_mask, args.budget_score, batch, tokens);
  checks::mask(kOp, "token_mask", args.token_mask, args.budget_score, batch, tokens);
  checks::neighbourhood(kOp, args.local_window, args.num_sinks);
  checks::mask(kOp, "extra_mask", args.extra_mask, args.budget_score, batch, tokens);
  checks::share(kOp, "max_ratio", args.max_ratio);
}

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {

plan::SelectTokensPlan select_tokens_plan(std::int64_t batch, std::int64_t tokens, int device) {
  return plan::plan_select_tokens(
      {batch, tokens, num_sms(device), shared_bytes_per_block(device), kernel_family(device) == KernelFamily::kSm90});
}

SelectTokensParams select_tokens_params(std::int64_t batch, std::int64_t tokens, const plan::SelectTokensPlan& plan,
                                        double tau, std::optional<double> ratio, double max_ratio,
                                        std::int64_t min_tokens, const ops::OptionalTensor& keep_mask,
                                        const ops::OptionalTensor& token_mask) {
  SelectTokensParams params{};
  params.keep_mask = optional_matrix<bool>(keep_mask, params.keep_stride);
  params.token_mask = optional_matrix<bool>(token_mask, params.mask_stride);
  params.batch = batch;
  params.tokens = static_cast<int>(tokens);
  params.min_tokens = static_cast<int>(std::min(min_tokens, tokens));
  params.tau = tau;
  params.ratio = ratio.value_or(0.0);
  params.max_ratio = max_ratio;
  params.blocks_per_row = static_cast<int>(plan.blocks_per_row);
  params.tokens_per_block = static_cast<int>(plan.tokens_per_block);
  params.row_groups = static_cast<int>(plan.row_groups);
  params.row_workspace_bytes = plan.row_workspace_bytes;
  return params;
}

ExtendSelectionParams extend_selection_params(std::int64_t batch, std::int64_t tokens, std::int64_t local_window,
                                              std::int64_t num_sinks, const ops::OptionalTensor& extra_mask,
                                              const ops::OptionalTensor& token_mask) {
  ExtendSelectionParams params{};
  params.token_mask = optional_matrix<bool>(token_mask, params.token_stride);
  params.extra_mask = optional_matrix<bool>(extra_mask, params.extra_stride);
  params.batch = batch;
  params.tokens = static_cast<int>(tokens);
  params.local_window = static_cast<int>(std::min(local_window, tokens));
  params.num_sinks = static_cast<int>(std::min(num_sinks, tokens));
  return params;
}

cudaError_t launch_select_tokens(const SelectTokensParams& params, const plan::SelectTokensPlan& plan,
                                 cudaStream_t stream) {
#ifdef ZIPVL_HAS_SM90
  if (plan.team == plan::SelectTeam::kCluster) {
    return launch_select_tokens_cluster(params, stream);
  }
#endif
  return launch_select_tokens(params, stream);
}

namespace {

ops::Implementation explain(const Tensor& q) {
  const auto plan = select_tokens_plan(q.size(0), q.size(2), q.get_device_index());
  return implementation_of(plan.team == plan::SelectTeam::kCluster ? KernelFamily::kSm90 : KernelFamily::kSm80,
                           plan.reason);
}

// Nothing where no kernel takes these inputs.
std::optional<ops::TensorPair> run(const ops::SelectTokensArgs& args) {
  const Tensor& score = args.budget_score;
  const std::int64_t batch = score.size(0), tokens = score.size(1);
  const DeviceGuard guard(score.get_device_index());
  const plan::SelectTokensPlan plan = select_tokens_plan(batch, tokens, score.get_device_index());
  if (!plan.reason.empty()) {
    return std::nullopt;
  }
  const Tensor index = empty({batch, tokens}, ScalarType::Int, score);
  const Tensor count = empty({batch}, ScalarType::Int, score);
  SelectTokensParams params = select_tokens_params(batch, tokens, plan, args.tau, args.ratio, args.max_ratio,
                                                   args.min_tokens, args.keep_mask, args.token_mask);
  params.budget_score = matrix<float>(score, params.budget_stride);
  params.rank_score = matrix<float>(args.rank_score, params.rank_stride);
  params.index = index.mutable_data_ptr<std::int32_t>();
  params.count = count.mutable_data_ptr<std::int32_t>();
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = empty({plan.workspace_bytes}, ScalarType::Byte, score);
    params.workspace = workspace->mutable_data_ptr();
  }
  check_launch(kOp, launch_select_tokens(params, plan, stream_of(score)));
  if (!args.extends()) {
    return ops::TensorPair{index, count};
  }
  const Tensor extended = empty({batch, tokens}, ScalarType::Int, score);
  const Tensor num_extended = empty({batch}, ScalarType::Int, score);
  ExtendSelectionParams extend =
      extend_selection_params(batch, tokens, args.local_window, args.num_sinks, args.extra_mask, args.token_mask);
  extend.index = params.index;
  extend.count = params.count;
  extend.extended_index = extended.mutable_data_ptr<std::int32_t>();
  extend.extended_count = num_extended.mutable_data_ptr<std::int32_t>();
  check_launch(kOp, launch_extend_selection(extend, stream_of(score)));
  return ops::TensorPair{extended, num_extended};
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

TensorPair select_tokens(const SelectTokensArgs& args) {
  check(args);
  const std::int64_t batch = args.budget_score.size(0), tokens = args.budget_score.size(1);
  if (batch == 0 || tokens == 0) {
    return {aten::zeros({batch, tokens}, aten::ScalarType::Int, args.budget_score.device()),
            aten::zeros({batch}, aten::ScalarType::Int, args.budget_score.device())};
  }
#ifdef ZIPVL_CUDA_OPS
  if (auto result = cuda::run(args)) {
    return *result;
  }
#endif
  return cpu::select_tokens(args);
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(select_tokens,
         "(Tensor budget_score, Tensor rank_score, *, float tau=0.975, float? ratio=None, int min_tokens=1, "
         "Tensor? keep_mask=None, Tensor? token_mask=None, int local_window=0, int num_sinks=0, "
         "Tensor? extra_mask=None, float max_ratio=1.0) -> (Tensor index, Tensor count)",
         &zipvl::cuda::explain)
