// probe_index: the probe tokens of each row (docs/ops.md, step 1).
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace {

constexpr const char* kOp = "probe_index";

void check(const ops::ProbeIndexArgs& args) {
  checks::query(kOp, args.q);
  checks::probe_counts(kOp, args.num_recent, args.num_random, args.seed);
  checks::mask(kOp, "token_mask", args.token_mask, args.q, args.q.size(0), args.q.size(2));
}

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {

ProbeIndexParams probe_index_params(std::int64_t batch, std::int64_t tokens, std::int64_t num_recent,
                                    std::int64_t num_random, std::int64_t seed, const ops::OptionalTensor& token_mask) {
  ProbeIndexParams params{};
  params.batch = batch;
  params.tokens = tokens;
  params.num_recent = num_recent;
  params.num_random = num_random;
  params.seed = static_cast<std::uint64_t>(seed);
  params.token_mask = optional_matrix<bool>(token_mask, params.mask_stride);
  return params;
}

namespace {

ops::Implementation explain(const Tensor& /*q*/) { return implementation_of(KernelFamily::kSm80, ""); }

Tensor run(const ops::ProbeIndexArgs& args) {
  const Tensor out = empty({args.q.size(0), args.num_recent + args.num_random}, ScalarType::Int, args.q);
  if (args.q.size(0) == 0) {
    return out;
  }
  const DeviceGuard guard(args.q.get_device_index());
  ProbeIndexParams params =
      probe_index_params(args.q.size(0), args.q.size(2), args.num_recent, args.num_random, args.seed, args.token_mask);
  params.out = out.mutable_data_ptr<std::int32_t>();
  check_launch(kOp, launch_probe_index(params, stream_of(args.q)));
  return out;
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

Tensor probe_index(const ProbeIndexArgs& args) {
  check(args);
#ifdef ZIPVL_CUDA_OPS
  return cuda::run(args);
#else
  return cpu::probe_index(args);
#endif
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(probe_index,
         "(Tensor q, *, int num_recent=64, int num_random=64, int seed=0, Tensor? token_mask=None) -> Tensor",
         &zipvl::cuda::explain)
