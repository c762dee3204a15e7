// sparse_attn: attention among the selected tokens (docs/ops.md, step 5).
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include <algorithm>

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
  params.queries = sizes.queries;
  params.head_dim = static_cast<int>(sizes.head_dim);
  params.element = element_of(q);
  params.scale = static_cast<float>(scale);
  params.causal = causal;
  params.all_queries = all_queries;
  params.zero_row_bytes = sizes.query_heads * sizes.head_dim * static_cast<std::int64_t>(q.element_size());
  return step;
}

void zero_padding(const char* op, const SparseAttnParams& params, const Tensor& token_mask, cudaStream_t stream) {
  ZeroPaddingParams padding{};
  padding.out = params.out;
  padding.token_mask = matrix<bool>(token_mask, padding.mask_stride);
  padding.batch = params.batch;
  padding.tokens = params.tokens;
  padding.row_bytes = params.zero_row_bytes;
  check_launch(op, launch_zero_padding(padding, stream));
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

RangedAttnStep ranged_attn_step(const checks::AttentionSizes& sizes, const SparseAttnStep& attention, bool all_queries,
                                std::int64_t local_window, std::int64_t num_sinks,
                                const ops::OptionalTensor& token_mask, const ops::OptionalTensor& last_key) {
  const bool window = local_window > 0, sm90 = attention.plan.kernel == plan::SparseAttnKernel::kSm90;
  // The copy engine takes no strides of 0, which an expanded tensor has.
  const SparseAttnParams& params = attention.params;
  const auto is_expanded = [&](const std::int64_t (&stride)[3]) {
    return (sizes.batch > 1 && stride[0] <= 0) || (sizes.kv_heads > 1 && stride[1] <= 0) ||
           (sizes.tokens > 1 && stride[2] <= 0);
  };
  const bool copies = sm90 && (is_expanded(params.k_stride) || is_expanded(params.v_stride));
  RangedAttnStep step{all_queries, local_window, num_sinks, token_mask, last_key, window && (token_mask || copies), {}};
  step.workspace =
      plan::plan_ranged_attn({sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.queries, sizes.tokens,
                              sizes.head_dim, window, step.lists_real, all_queries, attention.plan.kernel});
  return step;
}

namespace {

// One pass: packs its list of keys where the Hopper kernel wants that, and attends.
void launch_ranged_pass(const char* op, const SparseAttnParams& params, const plan::SparseAttnCudaPlan& plan,
                        [[maybe_unused]] bool packs, [[maybe_unused]] int device, cudaStream_t stream) {
#ifdef ZIPVL_HAS_SM90
  if (plan.kernel == plan::SparseAttnKernel::kSm90) {
    if (packs) {
      check_launch(op, launch_pack_kv(sparse_attn::sm90::packing(params, num_sms(device)), stream));
    }
    check_launch(op, sparse_attn::sm90::launch_sparse_attn(params, nullptr, num_sms(device), stream));
    return;
  }
#endif
  check_launch(op, launch_sparse_attn_sm80(params, stream));
}

}  // namespace

void launch_ranged_attn(const char* op, const SparseAttnParams& params, const plan::SparseAttnCudaPlan& plan,
                        const RangedAttnStep& step, unsigned char* space, bool lists, int device, cudaStream_t stream) {
  const auto ints = [space](std::int64_t offset) { return reinterpret_cast<std::int32_t*>(space + offset); };
  const plan::RangedAttnWorkspace& at = step.workspace;
  const bool window = step.local_window > 0;
  if (step.lists_real && lists) {
    ExtendSelectionParams list = extend_selection_params(params.batch, params.tokens, 0, 0, {}, step.token_mask);
    list.real_index = ints(at.real_index);
    list.real_count = ints(at.real_count);
    check_launch(op, launch_extend_selection(list, stream));
  }

  RowRangesParams rows{};
  rows.token_mask = optional_matrix<bool>(step.token_mask, rows.mask_stride);
  rows.last_key = optional_matrix<std::int32_t>(step.last_key, rows.last_key_stride);
  rows.real_index = step.lists_real ? ints(at.real_index) : nullptr;
  rows.real_count = step.lists_real ? ints(at.real_count) : nullptr;
  rows.batch = static_cast<int>(params.batch);
  rows.queries = static_cast<int>(params.queries);
  rows.tokens = static_cast<int>(params.tokens);
  rows.local_window = static_cast<int>(std::min(step.local_window, params.tokens));
  rows.num_sinks = static_cast<int>(std::min(step.num_sinks, params.tokens));
  RowRangesPass& selection = rows.pass[rows.passes++];
  selection.range = reinterpret_cast<int2*>(space + at.range);
  selection.group = reinterpret_cast<int4*>(space + at.group);
  selection.key_index = params.index;
  selection.key_count = params.count;
  std::copy_n(params.index_stride, 2, selection.key_index_stride);
  selection.key_count_stride = params.count_stride;
  if (!step.all_queries) {
    selection.query = ints(at.query);
    selection.num_rows = ints(at.num_rows);
    selection.row_index = params.index;
    selection.row_count = params.count;
    std::copy_n(params.index_stride, 2, selection.row_index_stride);
    selection.row_count_stride = params.count_stride;
  }
  if (window) {
    RowRangesPass& pass = rows.pass[rows.passes++];
    pass.range = reinterpret_cast<int2*>(space + at.window_range);
    pass.group = reinterpret_cast<int4*>(space + at.window_group);
    if (step.lists_real) {
      pass.key_index = rows.real_index;
      pass.key_count = rows.real_count;
      pass.key_index_stride[0] = params.tokens;
      pass.key_index_stride[1] = pass.key_count_stride = 1;
    }
    pass.in_window = true;
  }
  check_launch(op, launch_row_ranges(rows, stream));

  float* lse = window ? reinterpret_cast<float*>(space + at.lse) : nullptr;
  if (window) {
    SparseAttnParams near = params;
    near.ranges = {rows.pass[1].range, rows.pass[1].group, nullptr, nullptr, rows.num_sinks, lse, /*in_window=*/true,
                   /*merges=*/false};
    near.index = rows.pass[1].key_index;
    near.count = rows.pass[1].key_count;
    near.index_stride[0] = params.tokens;
    near.index_stride[1] = near.count_stride = 1;
    near.k_packed = step.lists_real ? space + at.real_k : nullptr;
    near.v_packed = step.lists_real ? space + at.real_v : nullptr;
    near.capacity = params.tokens;
    launch_ranged_pass(op, near, plan, step.lists_real, device, stream);
  } else if (!step.all_queries) {
    const std::int64_t row_bytes = params.query_heads * params.head_dim * std::int64_t{2};
    check_launch(op, cudaMemsetAsync(params.out, 0, static_cast<std::size_t>(params.batch * params.queries * row_bytes),
                                     stream));
  }
  SparseAttnParams far = params;
  far.ranges = {rows.pass[0].range,  rows.pass[0].group, rows.pass[0].query, rows.pass[0].num_rows, 0, lse,
                /*in_window=*/false,
                /*merges=*/window};
  launch_ranged_pass(op, far, plan, /*packs=*/true, device, stream);
}

namespace {

ops::Implementation explain(const Tensor& q) {
  const auto plan = sparse_attn_step(sizes_like(q), q, q, q, 1.0, true, false).plan;
  return implementation_of(plan.kernel == plan::SparseAttnKernel::kSm90 ? KernelFamily::kSm90 : KernelFamily::kSm80,
                           plan.reason);
}

// Nothing where no kernel takes these inputs.
std::optional<Tensor> run(const ops::SparseAttnArgs& args, const checks::AttentionSizes& sizes) {
  const Tensor& q = args.q;
  const DeviceGuard guard(q.get_device_index());
  SparseAttnStep step = sparse_attn_step(sizes, q, args.k, args.v, ops::scale_or_default(args.scale, sizes.head_dim),
                                         args.causal, args.all_queries);
  auto& [plan, params] = step;
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
  const Tensor out = empty_attention_output(q);
  params.out = out.mutable_data_ptr();
  if (args.local_window > 0 || sizes.queries != sizes.tokens || args.last_key) {
    const RangedAttnStep ranged = ranged_attn_step(sizes, step, args.all_queries, args.local_window, args.num_sinks,
                                                   args.token_mask, args.last_key);
    const Tensor space = empty({ranged.workspace.bytes}, ScalarType::Byte, q);
    launch_ranged_attn(kOp, params, plan, ranged, space.mutable_data_ptr<std::uint8_t>(), /*lists=*/true,
                       q.get_device_index(), stream_of(q));
    return out;
  }
  if (plan.seen_tokens) {
    seen = empty({sizes.batch, sizes.tokens}, ScalarType::Int, q);
  }
  params.zeros = args.all_queries ? nullptr : params.out;
  launch_sparse_attn(kOp, params, plan, seen ? seen->mutable_data_ptr<std::int32_t>() : nullptr, q.get_device_index(),
                     stream_of(q));
  if (args.all_queries && args.token_mask) {
    zero_padding(kOp, params, *args.token_mask, stream_of(q));
  }
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
