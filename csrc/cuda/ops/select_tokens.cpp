#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "cuda/ops/device.h"
#include "cuda/ops/ops.h"
#include "cuda/ops/steps.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::cuda {
namespace {

template <typename T>
const T* matrix(const Tensor& x, std::int64_t (&strides)[2]) {
  strides[0] = x.stride(0);
  strides[1] = x.stride(1);
  return x.const_data_ptr<T>();
}

constexpr const char* kOp = "select_tokens";

}  // namespace

plan::SelectTokensPlan select_tokens_plan(std::int64_t batch, std::int64_t tokens, int device) {
  return plan::plan_select_tokens(
      {batch, tokens, num_sms(device), shared_bytes_per_block(device), kernel_family(device) == KernelFamily::kSm90});
}

SelectTokensParams select_tokens_params(std::int64_t batch, std::int64_t tokens, const plan::SelectTokensPlan& plan,
                                        double tau, std::optional<double> ratio, std::int64_t min_tokens,
                                        const std::optional<Tensor>& keep_mask,
                                        const std::optional<Tensor>& token_mask) {
  SelectTokensParams params{};
  params.keep_mask = keep_mask ? matrix<bool>(*keep_mask, params.keep_stride) : nullptr;
  params.token_mask = token_mask ? matrix<bool>(*token_mask, params.mask_stride) : nullptr;
  params.batch = batch;
  params.tokens = static_cast<int>(tokens);
  params.min_tokens = static_cast<int>(std::min(min_tokens, tokens));
  params.tau = tau;
  params.ratio = ratio.value_or(0.0);
  params.blocks_per_row = static_cast<int>(plan.blocks_per_row);
  params.tokens_per_block = static_cast<int>(plan.tokens_per_block);
  params.row_groups = static_cast<int>(plan.row_groups);
  params.row_workspace_bytes = plan.row_workspace_bytes;
  return params;
}

cudaError_t launch_select_tokens(const SelectTokensParams& params, [[maybe_unused]] plan::SelectTeam team,
                                 cudaStream_t stream) {
#ifdef ZIPVL_HAS_SM90
  if (team == plan::SelectTeam::kCluster) {
    return launch_select_tokens_cluster(params, stream);
  }
#endif
  return launch_select_tokens(params, stream);
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& budget_score, const Tensor& rank_score, double tau,
                                         std::optional<double> ratio, std::int64_t min_tokens,
                                         const std::optional<Tensor>& keep_mask,
                                         const std::optional<Tensor>& token_mask) {
  checks::select_tokens(kOp, budget_score, rank_score, tau, ratio, min_tokens, keep_mask, token_mask);
  const std::int64_t batch = budget_score.size(0), tokens = budget_score.size(1);
  const std::int32_t device = budget_score.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const plan::SelectTokensPlan plan = select_tokens_plan(batch, tokens, device);
  if (batch == 0 || tokens == 0 || plan.team == plan::SelectTeam::kNone) {
    return ops::select_tokens(budget_score, rank_score, tau, ratio, min_tokens, keep_mask, token_mask);
  }
  const Tensor index = aten::empty({batch, tokens}, aten::ScalarType::Int, budget_score.device());
  const Tensor count = aten::empty({batch}, aten::ScalarType::Int, budget_score.device());
  SelectTokensParams params = select_tokens_params(batch, tokens, plan, tau, ratio, min_tokens, keep_mask, token_mask);
  params.budget_score = matrix<float>(budget_score, params.budget_stride);
  params.rank_score = matrix<float>(rank_score, params.rank_stride);
  params.index = index.mutable_data_ptr<std::int32_t>();
  params.count = count.mutable_data_ptr<std::int32_t>();
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = aten::empty({plan.workspace_bytes}, aten::ScalarType::Byte, budget_score.device());
    params.workspace = workspace->mutable_data_ptr();
  }
  check_launch(kOp, launch_select_tokens(params, plan.team, stream_of(budget_score)));
  return {index, count};
}

}  // namespace zipvl::cuda
