#include "cuda/ops/ops.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda/ops/device.h"
#include "cuda/ops/steps.h"
#include "ops/aten.h"
#include "ops/checks.h"

namespace zipvl::cuda {

ProbeIndexParams probe_index_params(const Tensor& q, std::int64_t num_recent, std::int64_t num_random,
                                    std::int64_t seed, const std::optional<Tensor>& token_mask) {
  ProbeIndexParams params{};
  params.batch = q.size(0);
  params.tokens = q.size(2);
  params.num_recent = num_recent;
  params.num_random = num_random;
  params.seed = static_cast<std::uint64_t>(seed);
  if (token_mask) {
    params.token_mask = token_mask->const_data_ptr<bool>();
    params.mask_stride[0] = token_mask->stride(0);
    params.mask_stride[1] = token_mask->stride(1);
  }
  return params;
}

Tensor probe_index(const Tensor& q, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                   const std::optional<Tensor>& token_mask) {
  constexpr const char* kOp = "probe_index";
  checks::probe_index(kOp, q, num_recent, num_random, seed, token_mask);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Tensor out = aten::empty({q.size(0), num_recent + num_random}, aten::ScalarType::Int, q.device());
  if (q.size(0) == 0) {
    return out;
  }
  ProbeIndexParams params = probe_index_params(q, num_recent, num_random, seed, token_mask);
  params.out = out.mutable_data_ptr<std::int32_t>();
  check_launch(kOp, launch_probe_index(params, stream_of(q)));
  return out;
}

}  // namespace zipvl::cuda
