#include "cuda/quantize_kv/params.h"

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "common/quantized_block.h"
#include "cuda/ops/device.h"
#include "cuda/ops/ops.h"
#include "ops/aten.h"
#include "ops/checks.h"

namespace zipvl::cuda {
namespace {

void copy_strides(const Tensor& x, std::int64_t (&strides)[3]) {
  for (int dim = 0; dim < 3; ++dim) {
    strides[dim] = x.stride(dim);
  }
}

std::optional<Element> element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case aten::ScalarType::Half:
      return Element::kFloat16;
    case aten::ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, std::int64_t high_bits,
                                                               std::int64_t low_bits,
                                                               const std::optional<Tensor>& v_factor,
                                                               const std::optional<Tensor>& token_mask) {
  using aten::ScalarType;
  constexpr const char* kOp = "quantize_kv";
  checks::quantize_kv(kOp, k, v, index, count, high_bits, low_bits, v_factor, token_mask);
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  QuantizeKvParams params{};
  params.batch = k.size(0);
  params.heads = k.size(1);
  params.tokens = k.size(2);
  params.head_dim = static_cast<int>(k.size(3));
  params.capacity = quantized::block_capacity(params.tokens);
  params.chunks = (params.tokens + kSplitChunk - 1) / kSplitChunk;
  params.bits[0] = static_cast<int>(high_bits);
  params.bits[1] = static_cast<int>(low_bits);
  params.element = element_of(k);
  const std::int64_t element_bytes = params.element ? 2 : 4;
  const auto packed = [&](int bits) {
    const std::int64_t bytes = quantized::block_layout(k.size(3), bits, element_bytes).bytes;
    return aten::zeros({params.batch, params.heads, params.capacity, bytes}, ScalarType::Byte, k.device());
  };
  const Tensor high = packed(params.bits[0]), low = packed(params.bits[1]);
  const aten::Sizes channels{params.batch, params.heads, k.size(3)};
  const Tensor factor = aten::empty(channels, ScalarType::Float, k.device());
  if (params.batch == 0 || params.tokens == 0) {
    const Tensor none = aten::zeros({params.batch}, ScalarType::Int, k.device());
    aten::copy_into(factor, v_factor ? *v_factor : aten::full({}, 1.0, ScalarType::Float, k.device()));
    return {high, none, low, aten::zeros({params.batch}, ScalarType::Int, k.device()), factor};
  }
  const Tensor high_blocks = aten::empty({params.batch}, ScalarType::Int, k.device());
  const Tensor low_blocks = aten::empty({params.batch}, ScalarType::Int, k.device());
  const Tensor chunk_rest = aten::empty({params.batch, params.chunks}, ScalarType::Int, k.device());
  const Tensor rest = aten::empty({params.batch, params.tokens}, ScalarType::Int, k.device());
  const Tensor rest_count = aten::empty({params.batch}, ScalarType::Int, k.device());
  std::optional<Tensor> largest;
  if (v_factor) {
    aten::copy_into(factor, *v_factor);
  } else {
    largest = aten::zeros(channels, ScalarType::Int, k.device());
    params.largest = reinterpret_cast<std::uint32_t*>(largest->mutable_data_ptr<std::int32_t>());
  }
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  copy_strides(k, params.k_stride);
  copy_strides(v, params.v_stride);
  params.index = index.const_data_ptr<std::int32_t>();
  params.index_stride[0] = index.stride(0);
  params.index_stride[1] = index.stride(1);
  params.count = count.const_data_ptr<std::int32_t>();
  params.count_stride = count.stride(0);
  if (token_mask) {
    params.token_mask = token_mask->const_data_ptr<bool>();
    params.mask_stride[0] = token_mask->stride(0);
    params.mask_stride[1] = token_mask->stride(1);
  }
  params.packed[0] = high.mutable_data_ptr<std::uint8_t>();
  params.packed[1] = low.mutable_data_ptr<std::uint8_t>();
  params.blocks[0] = high_blocks.mutable_data_ptr<std::int32_t>();
  params.blocks[1] = low_blocks.mutable_data_ptr<std::int32_t>();
  params.v_factor = factor.mutable_data_ptr<float>();
  params.chunk_rest = chunk_rest.mutable_data_ptr<std::int32_t>();
  params.rest = rest.mutable_data_ptr<std::int32_t>();
  params.rest_count = rest_count.mutable_data_ptr<std::int32_t>();
  check_launch(kOp, launch_quantize_kv(params, stream_of(k)));
  return {high, high_blocks, low, low_blocks, factor};
}

}  // namespace zipvl::cuda
