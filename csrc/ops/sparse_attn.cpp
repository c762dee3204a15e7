// sparse_attn: attention among the selected tokens (docs/ops.md, step 5).
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "cuda/sparse_attn/sm90/params.h"
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace {

constexpr const char* kOp = "sparse_attn";

checks::AttentionSizes check(const ops::SparseAttnArgs& args) {
  const auto sizes = checks::attention_inputs(kOp, args.q, {"k", args.k}, checks::Named{"v", args.v});
  checks::last_tokens(kOp, {"q", args.q}, 2, sizes.tokens, args.causal);
  checks::selection(kOp, args.q, args.index, args.count, sizes.batch, sizes.tokens);
  checks::scale(kOp, args.scale);
  checks::mask(kOp, "token_mask", args.token_mask, args.q, sizes.batch, sizes.tokens);
  checks::neighbourhood(kOp, args.local_window, args.num_sinks);
  checks::needs_causal(kOp, args.causal, args.local_window);
  checks::last_key(kOp, args.last_key, args.q, sizes.batch, sizes.queries, args.causal);
  return sizes;
}

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {

SparseAttnStep sparse_attn_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v,
                                double scale, bool causal, bool all_queries) {
  SparseAttnStep step{};
  step.plan =
      plan::plan_sparse_attn_cuda({sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens, sizes.head_dim,
                                   is_half(q), rows_are_aligned(q) && rows_are_aligned(k) && rows_are_aligned(v), scale,
                                   causal, all_queries, kernel_family(q.get_device_index()) == KernelFamily::kSm90});
  SparseAttnParams& params = step.params;
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  copy_strides(q, params.q_stride);
  copy_strides(k, params.k_stride);
  copy_strides(v, params.v_stride);
  params.batch = sizes.batch;
  params.query_heads = sizes.query_heads;
  params.kv_heads = sizes.kv_heads;
  params.tokens = sizes.tokens;
  params.head_dim = static_cast<int>(sizes.head_dim);
  params.element = element_of(q);
  params.scale = static_cast<float>(scale);
  params.causal = causal;
  params.all_queries = all_queries;
  params.zero_row_bytes = sizes.query_heads * sizes.head_dim * static_cast<std::int64_t>(q.element_size());
  return step;
}

void launch_sparse_attn(const char* op, const SparseAttnParams& params, const plan::SparseAttnCudaPlan& plan,
                        [[maybe_unused]] std::int32_t* seen, [[maybe_unused]] int device, cudaStream_t stream) {
#ifdef ZIPVL_HAS_SM90
  if (plan.kernel == plan::SparseAttnKernel::kSm90) {
    if (plan.seen_tokens) {
      SeenTokensParams counting{};
      counting.seen = seen;
      counting.index = params.index;
      counting.index_stride[0] = params.index_stride[0];
      counting.index_stride[1] = params.index_stride[1];
      counting.count = params.count;
      counting.count_stride = params.count_stride;
      counting.batch = params.batch;
      counting.tokens = params.tokens;
      check_launch(op, launch_seen_tokens(counting, stream));
    }
    check_launch(op, launch_pack_kv(sparse_attn::sm90::packing(params, num_sms(device)), stream));
    check_launch(op, sparse_attn::sm90::launch_sparse_attn(params, seen, num_sms(device), stream));
    return;
  }
#endif
  check_launch(op, launch_sparse_attn_sm80(params, stream));
}

namespace {

ops::Implementation explain(const Tensor& q) {
  const auto plan = sparse_attn_step(sizes_like(q), q, q, q, 1.0, true, false).plan;
  return implementation_of(plan.kernel == plan::SparseAttnKernel::kSm90 ? KernelFamily::kSm90 : KernelFamily::kSm80,
                           plan.reason);
}

// Nothing where no kernel takes these inputs.
std::optional<Tensor> run(const ops::SparseAttnArgs& args, const checks::AttentionSizes& sizes) {
  if (sizes.queries != sizes.tokens || args.token_mask || args.local_window > 0 || args.last_key) {
    return std::nullopt;
  }
  const Tensor& q = args.q;
  const DeviceGuard guard(q.get_device_index());
  auto [plan, params] = sparse_attn_step(sizes, q, args.k, args.v, ops::scale_or_default(args.scale, sizes.head_dim),
                                         args.causal, args.all_queries);
  if (plan.kernel == plan::SparseAttnKernel::kAten) {
    return std::nullopt;
  }
  params.index = matrix<std::int32_t>(args.index, params.index_stride);
  params.count = args.count.const_data_ptr<std::int32_t>();
  params.count_stride = args.count.stride(0);
  std::optional<Tensor> k_packed, v_packed, seen;
  if (plan.kernel == plan::SparseAttnKernel::kSm90) {
    k_packed = empty({sizes.batch, sizes.kv_heads, plan.capacity, sizes.head_dim}, q.scalar_type(), q);
    v_packed = empty({sizes.batch, sizes.kv_heads, plan.capacity, sizes.head_dim}, q.scalar_type(), q);
    params.k_packed = k_packed->mutable_data_ptr();
    params.v_packed = v_packed->mutable_data_ptr();
    params.capacity = plan.capacity;
  }
  if (plan.seen_tokens) {
    seen = empty({sizes.batch, sizes.tokens}, ScalarType::Int, q);
  }
  const Tensor out = empty_attention_output(q);
  params.out = out.mutable_data_ptr();
  params.zeros = args.all_queries ? nullptr : params.out;
  launch_sparse_attn(kOp, params, plan, seen ? seen->mutable_data_ptr<std::int32_t>() : nullptr, q.get_device_index(),
                     stream_of(q));
  return out;
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

Tensor sparse_attn(const SparseAttnArgs& args) {
  const auto sizes = check(args);
  if (sizes.batch == 0 || sizes.queries == 0) {
    const aten::Sizes shape{sizes.batch, sizes.queries, sizes.query_heads, sizes.head_dim};
    return aten::transpose(aten::empty(shape, args.q.scalar_type(), args.q.device()), 1, 2);
  }
#ifdef ZIPVL_CUDA_OPS
  if (auto result = cuda::run(args, sizes)) {
    return *result;
  }
#endif
  return cpu::sparse_attn(args);
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(sparse_attn,
         "(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, *, float? scale=None, bool causal=True, "
         "bool all_queries=False, Tensor? token_mask=None, int local_window=0, int num_sinks=0, "
         "Tensor? last_key=None) -> Tensor",
         &zipvl::cuda::explain)
