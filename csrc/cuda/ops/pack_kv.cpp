#include <torch/csrc/stable/accelerator.h>

#include "cuda/ops/ops.h"
#include "cuda/ops/steps.h"
#include "ops/aten.h"
#include "ops/checks.h"

namespace zipvl::cuda {
namespace {

// Of the first three dimensions. One of size 1 has any stride, which must not spoil the alignment of the others.
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
  params.element_bytes = k.scalar_type() == aten::ScalarType::Float ? 4 : 2;
  params.tail = 1;
  params.num_sms = num_sms(k.get_device_index());
  return params;
}

std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count) {
  constexpr const char* kOp = "pack_kv";
  checks::pack_kv(kOp, k, v, index, count);
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const aten::Sizes sizes{k.size(0), k.size(1), k.size(2), k.size(3)};
  const Tensor k_packed = aten::empty(sizes, k.scalar_type(), k.device());
  const Tensor v_packed = aten::empty(sizes, v.scalar_type(), v.device());
  PackKvParams params = pack_kv_params(k, v, k_packed.mutable_data_ptr(), v_packed.mutable_data_ptr(), k.size(2));
  params.index = index.const_data_ptr<std::int32_t>();
  params.count = count.const_data_ptr<std::int32_t>();
  params.index_stride[0] = index.stride(0);
  params.index_stride[1] = index.stride(1);
  params.count_stride = count.stride(0);
  check_launch(kOp, launch_pack_kv(params, stream_of(k)));
  return {k_packed, v_packed};
}

}  // namespace zipvl::cuda
