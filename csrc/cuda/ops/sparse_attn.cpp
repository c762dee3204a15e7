#include <torch/csrc/stable/accelerator.h>

#include "cuda/ops/ops.h"
#include "cuda/ops/steps.h"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm90/params.h"
#include "ops/aten.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::cuda {
namespace {

constexpr const char* kOp = "sparse_attn";

// Whether every row of x [B, H, N, D] begins at a multiple of 16 bytes.
bool rows_are_aligned(const Tensor& x) {
  constexpr std::int64_t kBytes = 16;
  if (reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kBytes != 0) {
    return false;
  }
  for (int dim = 0; dim < 3; ++dim) {
    if (x.size(dim) > 1 && x.stride(dim) * static_cast<std::int64_t>(x.element_size()) % kBytes != 0) {
      return false;
    }
  }
  return true;
}

void copy_strides(const Tensor& x, std::int64_t (&strides)[3]) {
  for (int dim = 0; dim < 3; ++dim) {
    strides[dim] = x.stride(dim);
  }
}

}  // namespace

SparseAttnStep sparse_attn_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v,
                                double scale, bool causal, bool all_queries) {
  SparseAttnStep step{};
  step.plan = plan::plan_sparse_attn_cuda(
      {sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens, sizes.head_dim,
       q.scalar_type() != aten::ScalarType::Float, rows_are_aligned(q) && rows_are_aligned(k) && rows_are_aligned(v),
       scale, causal, all_queries, kernel_family(q.get_device_index()) == KernelFamily::kSm90});
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
  params.element = q.scalar_type() == aten::ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
  params.scale = static_cast<float>(scale);
  params.causal = causal;
  params.all_queries = all_queries;
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

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   std::optional<double> scale, bool causal, bool all_queries) {
  const auto sizes = checks::sparse_attn(kOp, q, k, v, index, count, scale);
  const auto fallback = [&] { return ops::sparse_attn(q, k, v, index, count, scale, causal, all_queries); };
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return fallback();
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  auto [plan, params] =
      sparse_attn_step(sizes, q, k, v, ops::scale_or_default(scale, sizes.head_dim), causal, all_queries);
  if (plan.kernel == plan::SparseAttnKernel::kAten) {
    return fallback();
  }
  params.index = index.const_data_ptr<std::int32_t>();
  params.index_stride[0] = index.stride(0);
  params.index_stride[1] = index.stride(1);
  params.count = count.const_data_ptr<std::int32_t>();
  params.count_stride = count.stride(0);
  std::optional<Tensor> k_packed, v_packed, seen;
  if (plan.kernel == plan::SparseAttnKernel::kSm90) {
    const aten::Sizes packed{sizes.batch, sizes.kv_heads, plan.capacity, sizes.head_dim};
    k_packed = aten::empty(packed, q.scalar_type(), q.device());
    v_packed = aten::empty(packed, q.scalar_type(), q.device());
    params.k_packed = k_packed->mutable_data_ptr();
    params.v_packed = v_packed->mutable_data_ptr();
    params.capacity = plan.capacity;
  }
  if (plan.seen_tokens) {
    seen = aten::empty({sizes.batch, sizes.tokens}, aten::ScalarType::Int, q.device());
  }
  const Tensor out = empty_attention_output(q);
  params.out = out.mutable_data_ptr();
  launch_sparse_attn(kOp, params, plan, seen ? seen->mutable_data_ptr<std::int32_t>() : nullptr, q.get_device_index(),
                     stream_of(q));
  return out;
}

}  // namespace zipvl::cuda
