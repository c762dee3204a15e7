// quantize_kv: keys and values of a `quantize` cache (docs/ops.md, step 6; docs/cache.md has the bytes).
#include <array>
#include <vector>

#include "common/quantized_block.h"
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "common/math.h"
#include "cuda/quantize_kv/params.h"
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace ops {
namespace {

constexpr const char* kOp = "quantize_kv";

using QuantizedSegments = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct QuantizeKvArgs {
  Tensor k, v, index, count;
  std::vector<std::int64_t> high_bits, low_bits;
  OptionalTensor v_factor, token_mask;
  static QuantizeKvArgs read(Arguments& in) {
    return {in.tensor(),   in.tensor(),   in.tensor(),          in.tensor(),
            in.integers(), in.integers(), in.optional_tensor(), in.optional_tensor()};
  }
};

// Bits of the high and the low segment.
std::array<quantized::Bits, 2> check(const QuantizeKvArgs& args) {
  const Tensor& k = args.k;
  checks::kv_pair(kOp, {"k", k}, {"v", args.v});
  checks::quantized_head_dim(kOp, {"k", k});
  checks::selection(kOp, k, args.index, args.count, k.size(0), k.size(2));
  const std::array bits{checks::bits(kOp, "high_bits", args.high_bits), checks::bits(kOp, "low_bits", args.low_bits)};
  if (args.v_factor) {
    checks::value_factor(kOp, *args.v_factor, k, k.size(1));
  }
  checks::mask(kOp, "token_mask", args.token_mask, k, k.size(0), k.size(2));
  return bits;
}

}  // namespace
}  // namespace ops

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

ops::Implementation explain(const Tensor& /*q*/) { return implementation_of(KernelFamily::kSm80, ""); }

ops::QuantizedSegments run(const ops::QuantizeKvArgs& args, const std::array<quantized::Bits, 2>& bits) {
  const auto& [k, v, index, count, high_bits, low_bits, v_factor, token_mask] = args;
  const DeviceGuard guard(k.get_device_index());
  QuantizeKvParams params{};
  params.batch = k.size(0);
  params.heads = k.size(1);
  params.tokens = k.size(2);
  params.head_dim = static_cast<int>(k.size(3));
  params.capacity = quantized::block_capacity(params.tokens);
  params.chunks = ceil_div<std::int64_t>(params.tokens, kSplitChunk);
  params.bits[0] = bits[0];
  params.bits[1] = bits[1];
  params.element = is_half(k) ? std::optional(element_of(k)) : std::nullopt;  // float32
  const auto packed = [&](quantized::Bits of_segment) {
    const auto element_bytes = static_cast<std::int64_t>(k.element_size());
    const std::int64_t bytes = quantized::block_layout(k.size(3), of_segment, element_bytes).bytes;
    return aten::zeros({params.batch, params.heads, params.capacity, bytes}, ScalarType::Byte, k.device());
  };
  const Tensor high = packed(bits[0]), low = packed(bits[1]);
  const Tensor factor = empty({params.batch, params.heads, k.size(3)}, ScalarType::Float, k);
  if (params.batch == 0 || params.tokens == 0) {
    const Tensor none = aten::zeros({params.batch}, ScalarType::Int, k.device());
    aten::copy_into(factor, v_factor ? *v_factor : aten::full({}, 1.0, ScalarType::Float, k.device()));
    return {high, none, low, aten::zeros({params.batch}, ScalarType::Int, k.device()), factor};
  }
  const Tensor high_blocks = empty({params.batch}, ScalarType::Int, k);
  const Tensor low_blocks = empty({params.batch}, ScalarType::Int, k);
  const Tensor chunk_rest = empty({params.batch, params.chunks}, ScalarType::Int, k);
  const Tensor rest = empty({params.batch, params.tokens}, ScalarType::Int, k);
  const Tensor rest_count = empty({params.batch}, ScalarType::Int, k);
  std::optional<Tensor> largest;
  if (v_factor) {
    aten::copy_into(factor, *v_factor);
  } else {
    largest = aten::zeros({params.batch, params.heads, k.size(3)}, ScalarType::Int, k.device());
    params.largest = reinterpret_cast<std::uint32_t*>(largest->mutable_data_ptr<std::int32_t>());
  }
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  copy_strides(k, params.k_stride);
  copy_strides(v, params.v_stride);
  params.index = matrix<std::int32_t>(index, params.index_stride);
  params.count = count.const_data_ptr<std::int32_t>();
  params.count_stride = count.stride(0);
  params.token_mask = optional_matrix<bool>(token_mask, params.mask_stride);
  params.packed[0] = high.mutable_data_ptr<std::uint8_t>();
  params.packed[1] = low.mutable_data_ptr<std::uint8_t>();
  params.blocks[0] = high_blocks.mutable_data_ptr<std::int32_t>();
  params.blocks[1] = low_blocks.mutable_data_ptr<std::int32_t>();
  params.v_factor = factor.mutable_data_ptr<float>();
  params.chunk_rest = chunk_rest.mutable_data_ptr<std::int32_t>();
  params.rest = rest.mutable_data_ptr<std::int32_t>();
  params.rest_count = rest_count.mutable_data_ptr<std::int32_t>();
  check_launch(ops::kOp, launch_quantize_kv(params, stream_of(k)));
  return {high, high_blocks, low, low_blocks, factor};
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

static QuantizedSegments quantize_kv(const QuantizeKvArgs& args) {
  const auto bits = check(args);
#ifdef ZIPVL_CUDA_OPS
  return cuda::run(args, bits);
#else
  return cpu::quantize_kv(args.k, args.v, args.index, args.count, bits[0], bits[1], args.v_factor, args.token_mask);
#endif
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(quantize_kv,
         "(Tensor k, Tensor v, Tensor index, Tensor count, *, int[2] high_bits=4, int[2] low_bits=[4, 2], "
         "Tensor? v_factor=None, Tensor? token_mask=None) "
         "-> (Tensor high, Tensor high_blocks, Tensor low, Tensor low_blocks, Tensor v_factor)",
         &zipvl::cuda::explain)
