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
  std::int64_t tokens = args.q.size(2);
  if (args.k) {
    const checks::Named k{"k", *args.k};
    checks::rank(kOp, k, 4, "[B, Hkv, S, D]");
    if (args.k->size(0) != args.q.size(0)) {
      checks::fail(kOp, "k must have q's batch size ", args.q.size(0), ", got ", args.k->size(0), " (shape ",
                   checks::shape_text(*args.k), ")");
    }
    checks::same_device(kOp, args.q, k);
    tokens = args.k->size(2);
    checks::last_tokens(kOp, {"q", args.q}, 2, tokens, /*causal=*/true);
  }
  checks::mask(kOp, "token_mask", args.token_mask, args.q, args.q.size(0), tokens);
}

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {

ProbeIndexParams probe_index_params(std::int64_t batch, std::int64_t queries, std::int64_t tokens,
                                    std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                                    const ops::OptionalTensor& token_mask) {
  ProbeIndexParams params{};
  params.batch = batch;
  params.tokens = tokens;
  params.first = tokens - queries;
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
  ProbeIndexParams params = probe_index_params(args.q.size(0), args.q.size(2), (args.k ? *args.k : args.q).size(2),
                                               args.num_recent, args.num_random, args.seed, args.token_mask);
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
  const std::int64_t queries = args.q.size(2), first = args.k ? args.k->size(2) - queries : 0;
  if (first == 0) {
    return cpu::probe_index(args);
  }
  // Drawn among the last `queries` tokens, as positions in all.
  ProbeIndexArgs last{args.q, args.num_recent, args.num_random, args.seed, std::nullopt};
  if (args.token_mask) {
    last.token_mask = aten::slice(*args.token_mask, 1, first, queries);
  }
  const Tensor drawn = cpu::probe_index(last);
  const Tensor none = aten::scalar(-1, aten::ScalarType::Int, args.q.device());
  return aten::where(aten::less(none, drawn), aten::shifted(drawn, first), none);
#endif
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(probe_index,
         "(Tensor q, *, int num_recent=64, int num_random=64, int seed=0, Tensor? token_mask=None, Tensor? k=None) "
         "-> Tensor",
         &zipvl::cuda::explain)
