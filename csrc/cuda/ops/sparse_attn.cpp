#include <torch/csrc/stable/accelerator.h>

#include "aten/call.h"
#include "cuda/ops/device.h"
#include "cuda/ops/ops.h"
#include "cuda/pack_kv/pack_kv.h"
#include "cuda/sparse_attn/seen_tokens.h"
#include "cuda/sparse_attn/sm80/launch.h"
#include "cuda/sparse_attn/sm90/launch.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"
#include "plan/sparse_attn_cuda.h"

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

SparseAttnParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                           const Tensor& out) {
  SparseAttnParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  copy_strides(q, params.q_stride);
  copy_strides(k, params.k_stride);
  copy_strides(v, params.v_stride);
  params.out = out.mutable_data_ptr();
  params.index = index.const_data_ptr<std::int32_t>();
  params.index_stride[0] = index.stride(0);
  params.index_stride[1] = index.stride(1);
  params.count = count.const_data_ptr<std::int32_t>();
  params.count_stride = count.stride(0);
  params.batch = q.size(0);
  params.query_heads = q.size(1);
  params.kv_heads = k.size(1);
  params.tokens = q.size(2);
  params.head_dim = static_cast<int>(q.size(3));
  params.element = q.scalar_type() == aten::ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
  return params;
}

#ifdef ZIPVL_HAS_SM90
PackKvParams pack_params_of(const SparseAttnParams& attn, int device) {
  PackKvParams params{};
  params.k = attn.k;
  params.v = attn.v;
  params.k_packed = attn.k_packed;
  params.v_packed = attn.v_packed;
  params.index = attn.index;
  params.count = attn.count;
  params.count_stride = attn.count_stride;
  const std::int64_t head = attn.capacity * attn.head_dim;
  const std::int64_t packed_stride[3] = {attn.kv_heads * head, head, attn.head_dim};
  for (int dim = 0; dim < 3; ++dim) {
    params.k_stride[dim] = attn.k_stride[dim];
    params.v_stride[dim] = attn.v_stride[dim];
    params.k_packed_stride[dim] = params.v_packed_stride[dim] = packed_stride[dim];
  }
  params.index_stride[0] = attn.index_stride[0];
  params.index_stride[1] = attn.index_stride[1];
  params.batch = attn.batch;
  params.heads = attn.kv_heads;
  params.tokens = attn.tokens;
  params.capacity = attn.capacity;
  params.head_dim = attn.head_dim;
  params.element_bytes = 2;
  params.tail = attn::sm90::kPackedRows;
  params.multiprocessors = multiprocessors(device);
  return params;
}

// Packs K and V, counts what each query sees where that is asked for, and attends.
void run_sm90(SparseAttnParams params, const plan::SparseAttnCudaPlan& plan, const Tensor& q) {
  const cudaStream_t stream = stream_of(q);
  const int device = q.get_device_index();
  const auto workspace = [&] {
    return aten::empty({params.batch, params.kv_heads, plan.capacity, params.head_dim}, q.scalar_type(), q.device());
  };
  const Tensor k_packed = workspace(), v_packed = workspace();
  params.k_packed = k_packed.mutable_data_ptr();
  params.v_packed = v_packed.mutable_data_ptr();
  params.capacity = plan.capacity;
  std::optional<Tensor> seen;
  if (plan.seen_tokens) {
    seen = aten::empty({params.batch, params.tokens}, aten::ScalarType::Int, q.device());
    SeenTokensParams counting{};
    counting.seen = seen->mutable_data_ptr<std::int32_t>();
    counting.index = params.index;
    counting.index_stride[0] = params.index_stride[0];
    counting.index_stride[1] = params.index_stride[1];
    counting.count = params.count;
    counting.count_stride = params.count_stride;
    counting.batch = params.batch;
    counting.tokens = params.tokens;
    check_launch(kOp, launch_seen_tokens(counting, stream));
  }
  check_launch(kOp, launch_pack_kv(pack_params_of(params, device), stream));
  const std::int32_t* seen_data = seen ? seen->const_data_ptr<std::int32_t>() : nullptr;
  check_launch(kOp, attn::sm90::launch_sparse_attn(params, seen_data, multiprocessors(device), stream));
}
#endif

}  // namespace

Tensor sparse_attn(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                   std::optional<double> scale, bool causal, bool all_queries) {
  const auto sizes = checks::sparse_attn(kOp, q, k, v, index, count, scale);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return ops::sparse_attn(q, k, v, index, count, scale, causal, all_queries);
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const double factor = ops::scale_or_default(scale, sizes.head_dim);
  const auto plan = plan::plan_sparse_attn_cuda(
      {sizes.batch, sizes.query_heads, sizes.kv_heads, sizes.tokens, sizes.head_dim,
       q.scalar_type() != aten::ScalarType::Float, rows_are_aligned(q) && rows_are_aligned(k) && rows_are_aligned(v),
       factor, causal, all_queries, kernel_family(q.get_device_index()) == KernelFamily::kSm90});
  if (plan.kernel == plan::SparseAttnKernel::kAten) {
    return ops::sparse_attn(q, k, v, index, count, scale, causal, all_queries);
  }
  const Tensor out =
      aten::empty({sizes.batch, sizes.tokens, sizes.query_heads, sizes.head_dim}, q.scalar_type(), q.device());
  SparseAttnParams params = params_of(q, k, v, index, count, out);
  params.scale = static_cast<float>(factor);
  params.causal = causal;
  params.all_queries = all_queries;
#ifdef ZIPVL_HAS_SM90
  if (plan.kernel == plan::SparseAttnKernel::kSm90) {
    run_sm90(params, plan, q);
    return aten::transpose(out, 1, 2);
  }
#endif
  check_launch(kOp, launch_sparse_attn_sm80(params, stream_of(q)));
  return aten::transpose(out, 1, 2);
}

}  // namespace zipvl::cuda
