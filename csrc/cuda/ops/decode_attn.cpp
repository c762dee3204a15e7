#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/plan.h"
#include "cuda/ops/device.h"
#include "cuda/ops/ops.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::cuda {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr float kLog2E = 1.4426950408889634F;

// Whether all of x's dims but the last have strides of multiples of 16 bytes, and x begins at one.
bool aligned(const Tensor& x, std::int64_t element_bytes) {
  bool all = reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kVectorBytes == 0;
  for (std::int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    all = all && (x.size(dim) == 1 || x.stride(dim) * element_bytes % kVectorBytes == 0);
  }
  return all;
}

void copy_strides(const Tensor& x, std::int64_t (&strides)[3]) {
  for (int dim = 0; dim < 3; ++dim) {
    strides[dim] = x.stride(dim);
  }
}

plan::DecodeAttnCudaProblem problem_of(const checks::AttentionSizes& sizes, const Tensor& q, std::int64_t slots,
                                       bool all_aligned) {
  const int device = q.get_device_index();
  return {sizes.batch,
          sizes.query_heads,
          sizes.kv_heads,
          sizes.head_dim,
          slots,
          q.scalar_type() != aten::ScalarType::Float,
          all_aligned && aligned(q, 2),
          num_sms(device),
          shared_bytes_per_block(device)};
}

// Outputs, workspace and what every launch needs; the caches are the caller's to set.
struct Launch {
  Tensor out, lse, partial_out, partial_lse;
  DecodeAttnParams params{};

  Launch(const checks::AttentionSizes& sizes, const Tensor& q, const plan::DecodeAttnCudaPlan& plan, double scale)
      : out(aten::empty({sizes.batch, 1, sizes.query_heads, sizes.head_dim}, q.scalar_type(), q.device())),
        lse(aten::empty({sizes.batch, sizes.query_heads, 1}, aten::ScalarType::Float, q.device())),
        partial_out(aten::empty({plan.partials, kDecodeHeads, sizes.head_dim}, aten::ScalarType::Float, q.device())),
        partial_lse(aten::empty({plan.partials, kDecodeHeads}, aten::ScalarType::Float, q.device())) {
    params.q = q.const_data_ptr();
    params.q_stride[0] = q.stride(0);
    params.q_stride[1] = q.stride(1);
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr<float>();
    params.partials = {partial_out.mutable_data_ptr<float>(), partial_lse.mutable_data_ptr<float>()};
    params.batch = sizes.batch;
    params.query_heads = sizes.query_heads;
    params.kv_heads = sizes.kv_heads;
    params.head_dim = static_cast<int>(sizes.head_dim);
    params.head_chunks = plan.head_chunks;
    params.blocks = plan.blocks;
    params.warps = plan.warps;
    params.shared_bytes = static_cast<int>(plan.shared_bytes);
    params.scale_log2 = static_cast<float>(scale) * kLog2E;
    params.element = q.scalar_type() == aten::ScalarType::BFloat16 ? Element::kBFloat16 : Element::kFloat16;
  }

  void set_cache(const Tensor& k, const Tensor& v, const Tensor& lengths) {
    params.k = k.const_data_ptr();
    params.v = v.const_data_ptr();
    copy_strides(k, params.k_stride);
    copy_strides(v, params.v_stride);
    params.lengths = lengths.const_data_ptr<std::int32_t>();
    params.lengths_stride = lengths.stride(0);
    params.slots = k.size(2);
  }

  std::tuple<Tensor, Tensor> result() { return {aten::transpose(out, 1, 2), lse}; }
};

QuantizedSegment segment_of(const Tensor& packed, const Tensor& blocks, std::int64_t bits) {
  QuantizedSegment segment{};
  segment.packed = static_cast<const std::uint8_t*>(packed.const_data_ptr());
  copy_strides(packed, segment.stride);
  segment.blocks = blocks.const_data_ptr<std::int32_t>();
  segment.blocks_stride = blocks.stride(0);
  segment.capacity = static_cast<int>(packed.size(2));
  segment.bits = static_cast<int>(bits);
  return segment;
}

}  // namespace

std::tuple<Tensor, Tensor> decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& lengths, std::optional<double> scale) {
  constexpr const char* kOp = "decode_attn";
  const auto sizes = checks::decode_attn(kOp, q, k_cache, v_cache, lengths, scale);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return ops::decode_attn(q, k_cache, v_cache, lengths, scale);
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const auto plan =
      plan::plan_decode_attn_cuda(problem_of(sizes, q, sizes.tokens, aligned(k_cache, 2) && aligned(v_cache, 2)));
  if (!plan.reason.empty()) {
    return ops::decode_attn(q, k_cache, v_cache, lengths, scale);
  }
  Launch launch(sizes, q, plan, ops::scale_or_default(scale, sizes.head_dim));
  launch.set_cache(k_cache, v_cache, lengths);
  check_launch(kOp, launch_decode_attn(launch.params, stream_of(q)));
  return launch.result();
}

std::tuple<Tensor, Tensor> decode_attn_quantized(
    const Tensor& q, const Tensor& high, const Tensor& high_blocks, const Tensor& low, const Tensor& low_blocks,
    const Tensor& v_factor, std::int64_t high_bits, std::int64_t low_bits, const std::optional<Tensor>& k_recent,
    const std::optional<Tensor>& v_recent, const std::optional<Tensor>& recent_lengths, std::optional<double> scale) {
  constexpr const char* kOp = "decode_attn_quantized";
  const auto sizes = checks::decode_attn_quantized(kOp, q, high, high_blocks, low, low_blocks, v_factor, high_bits,
                                                   low_bits, k_recent, v_recent, recent_lengths, scale);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const std::int64_t slots = k_recent ? k_recent->size(2) : 0;
  const bool all_aligned =
      aligned(high, 1) && aligned(low, 1) && (slots == 0 || (aligned(*k_recent, 2) && aligned(*v_recent, 2)));
  const auto plan = plan::plan_decode_attn_quantized_cuda(
      problem_of(sizes, q, slots, all_aligned),
      {high.size(2), low.size(2), static_cast<int>(high_bits), static_cast<int>(low_bits)});
  if (!plan.reason.empty()) {
    checks::fail(kOp, "cannot run on ", "this GPU: ", plan.reason);
  }
  Launch launch(sizes, q, plan, ops::scale_or_default(scale, sizes.head_dim));
  if (sizes.batch == 0) {
    return launch.result();
  }
  if (slots > 0) {
    launch.set_cache(*k_recent, *v_recent, *recent_lengths);
  }
  DecodeAttnQuantizedParams params{};
  params.attn = launch.params;
  params.segments[0] = segment_of(high, high_blocks, high_bits);
  params.segments[1] = segment_of(low, low_blocks, low_bits);
  params.v_factor = v_factor.const_data_ptr<float>();
  copy_strides(v_factor, params.v_factor_stride);
  check_launch(kOp, launch_decode_attn_quantized(params, stream_of(q)));
  return launch.result();
}

}  // namespace zipvl::cuda
