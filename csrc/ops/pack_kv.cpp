// pack_kv: the selected rows of K and V, moved to the front (docs/ops.md, step 6).
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace {

constexpr const char* kOp = "pack_kv";

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

// Strides of the first three dimensions. One of size 1 has any stride, which must not spoil the others' alignment.
void set_strides(std::int64_t (&strides)[3], const Tensor& x) {
  for (std::int64_t d = 0; d < 3; ++d) {
    strides[d] = x.size(d) > 1 ? x.stride(d) : 0;
  }
}

}  // namespace

PackKvParams pack_kv_params(const Tensor& k, const Tensor& v, void* k_packed, void* v_packed, std::int64_t capacity) {
  PackKvParams params{};
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.k_packed = k_packed;
  params.v_packed = v_packed;
  set_strides(params.k_stride, k);
  set_strides(params.v_stride, v);
  params.batch = k.size(0);
  params.heads = k.size(1);
  params.tokens = k.size(2);
  params.capacity = capacity;
  params.head_dim = k.size(3);
  const std::int64_t head = capacity * params.head_dim;
  const std::int64_t packed_stride[3] = {params.batch > 1 ? params.heads * head : 0, params.heads > 1 ? head : 0,
                                         capacity > 1 ? params.head_dim : 0};
  for (int d = 0; d < 3; ++d) {
    params.k_packed_stride[d] = params.v_packed_stride[d] = packed_stride[d];
  }
  params.element_bytes = static_cast<int>(k.element_size());
  params.tail = 1;
  params.num_sms = num_sms(k.get_device_index());
  return params;
}

namespace {

ops::Implementation explain(const Tensor& /*q*/) { return implementation_of(KernelFamily::kSm80, ""); }

ops::TensorPair run(const ops::PackKvArgs& args) {
  const auto& [k, v, index, count] = args;
  const DeviceGuard guard(k.get_device_index());
  const Tensor k_packed = empty({k.size(0), k.size(1), k.size(2), k.size(3)}, k.scalar_type(), k);
  const Tensor v_packed = empty({k.size(0), k.size(1), k.size(2), k.size(3)}, v.scalar_type(), v);
  PackKvParams params = pack_kv_params(k, v, k_packed.mutable_data_ptr(), v_packed.mutable_data_ptr(), k.size(2));
  params.index = matrix<std::int32_t>(index, params.index_stride);
  params.count = count.const_data_ptr<std::int32_t>();
  params.count_stride = count.stride(0);
  check_launch(kOp, launch_pack_kv(params, stream_of(k)));
  return {k_packed, v_packed};
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

TensorPair pack_kv(const PackKvArgs& args) {
  const auto& [k, v, index, count] = args;
  checks::kv_pair(kOp, {"k", k}, {"v", v});
  checks::selection(kOp, k, index, count, k.size(0), k.size(2));
  if (k.size(0) == 0 || k.size(2) == 0) {
    const aten::Sizes shape{k.size(0), k.size(1), k.size(2), k.size(3)};
    return {aten::empty(shape, k.scalar_type(), k.device()), aten::empty(shape, v.scalar_type(), v.device())};
  }
#ifdef ZIPVL_CUDA_OPS
  return cuda::run(args);
#else
  return cpu::pack_kv(args);
#endif
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(pack_kv, "(Tensor k, Tensor v, Tensor index, Tensor count) -> (Tensor k_packed, Tensor v_packed)",
         &zipvl::cuda::explain)
