// decode_attn and decode_attn_quantized: one new query a row against its cache (docs/ops.md, step 6).
#include <limits>
#include <vector>

#include "common/quantized_block.h"
#include "cpu/cpu.h"
#include "cpu/tokens.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/plan.h"
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace ops {
namespace {

struct DecodeAttnArgs {
  Tensor q, k_cache, v_cache, lengths;
  std::optional<double> scale;
  static DecodeAttnArgs read(Arguments& in) {
    return {in.tensor(), in.tensor(), in.tensor(), in.tensor(), in.optional_real()};
  }
};

struct DecodeAttnQuantizedArgs {
  Tensor q, high, high_blocks, low, low_blocks, v_factor;
  std::vector<std::int64_t> high_bits, low_bits;
  OptionalTensor k_recent, v_recent, recent_lengths;
  std::optional<double> scale;
  static DecodeAttnQuantizedArgs read(Arguments& in) {
    return {in.tensor(),          in.tensor(),          in.tensor(),          in.tensor(),
            in.tensor(),          in.tensor(),          in.integers(),        in.integers(),
            in.optional_tensor(), in.optional_tensor(), in.optional_tensor(), in.optional_real()};
  }
};

// `tokens` of the sizes is the number of slots.
checks::AttentionSizes check(const DecodeAttnArgs& args) {
  constexpr const char* kOp = "decode_attn";
  const auto sizes =
      checks::attention_inputs(kOp, args.q, {"k_cache", args.k_cache}, checks::Named{"v_cache", args.v_cache});
  checks::query_tokens(kOp, args.q, 1);
  checks::int_vector(kOp, args.q, {"lengths", args.lengths}, sizes.batch);
  checks::scale(kOp, args.scale);
  return sizes;
}

// packed [B, Hkv, M, bytes] uint8 and blocks [B] int32
void check_segment(const char* op, const Tensor& q, checks::Named packed, checks::Named blocks, std::int64_t kv_heads,
                   quantized::Bits bits) {
  const Tensor& bytes = packed.tensor;
  checks::dtype(op, packed, checks::ScalarType::Byte);
  if (bytes.dim() != 4) {
    checks::fail(op, packed.name, " must have 4 dimensions [B, Hkv, blocks, bytes], got ", bytes.dim());
  }
  const std::int64_t element_bytes = static_cast<std::int64_t>(q.element_size());
  checks::shape(op, packed,
                {q.size(0), kv_heads, bytes.size(2), quantized::block_layout(q.size(3), bits, element_bytes).bytes});
  checks::unit_last_stride(op, packed);
  checks::same_device(op, q, packed);
  checks::int_vector(op, q, blocks, q.size(0));
}

void check_recent(const char* op, const DecodeAttnQuantizedArgs& args, std::int64_t kv_heads) {
  const auto& [k, v, lengths] = std::tie(args.k_recent, args.v_recent, args.recent_lengths);
  if (k.has_value() != v.has_value() || k.has_value() != lengths.has_value()) {
    checks::fail(op, "k_recent, v_recent and recent_lengths must be given together, got ", k ? "k_recent " : "",
                 v ? "v_recent " : "", lengths ? "recent_lengths " : "", "alone");
  }
  if (k) {
    const auto sizes = checks::attention_inputs(op, args.q, {"k_recent", *k}, checks::Named{"v_recent", *v});
    checks::shape(op, {"k_recent", *k}, {sizes.batch, kv_heads, sizes.tokens, sizes.head_dim});
    checks::int_vector(op, args.q, {"recent_lengths", *lengths}, args.q.size(0));
  }
}

struct QuantizedSizes : checks::AttentionSizes {  // `tokens` is the number of recent slots
  quantized::Bits high_bits, low_bits;
};

QuantizedSizes check(const DecodeAttnQuantizedArgs& args) {
  constexpr const char* kOp = "decode_attn_quantized";
  const Tensor& q = args.q;
  checks::query(kOp, q);
  checks::query_tokens(kOp, q, 1);
  checks::quantized_head_dim(kOp, {"q", q});
  const quantized::Bits high_bits = checks::bits(kOp, "high_bits", args.high_bits);
  const quantized::Bits low_bits = checks::bits(kOp, "low_bits", args.low_bits);
  if (args.high.dim() != 4) {
    checks::fail(kOp, "high must have 4 dimensions [B, Hkv, blocks, bytes], got ", args.high.dim());
  }
  const std::int64_t kv_heads = args.high.size(1);
  checks::heads_divide(kOp, "high", kv_heads, q.size(1));
  check_segment(kOp, q, {"high", args.high}, {"high_blocks", args.high_blocks}, kv_heads, high_bits);
  check_segment(kOp, q, {"low", args.low}, {"low_blocks", args.low_blocks}, kv_heads, low_bits);
  checks::value_factor(kOp, args.v_factor, q, kv_heads);
  check_recent(kOp, args, kv_heads);
  checks::scale(kOp, args.scale);
  return {
      {q.size(0), q.size(1), kv_heads, 1, args.k_recent ? args.k_recent->size(2) : 0, q.size(3)}, high_bits, low_bits};
}

// The log-sum-exp of rows that attend to nothing.
TensorPair nothing(const checks::AttentionSizes& sizes, const Tensor& q) {
  const aten::Sizes shape{sizes.batch, 1, sizes.query_heads, sizes.head_dim};
  return {aten::transpose(aten::zeros(shape, q.scalar_type(), q.device()), 1, 2),
          aten::full({sizes.batch, sizes.query_heads, 1}, -std::numeric_limits<double>::infinity(),
                     aten::ScalarType::Float, q.device())};
}

}  // namespace
}  // namespace ops

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634F;

plan::DecodeAttnCudaProblem problem_of(const checks::AttentionSizes& sizes, const Tensor& q, bool aligned) {
  const int device = q.get_device_index();
  return {sizes.batch,
          sizes.query_heads,
          sizes.kv_heads,
          sizes.head_dim,
          sizes.tokens,
          is_half(q),
          aligned && rows_are_aligned(q),
          num_sms(device),
          shared_bytes_per_block(device)};
}

// Outputs, workspace and what every launch needs; the caches are the caller's to set.
struct Launch {
  Tensor out, lse, partial_out, partial_lse;
  DecodeAttnParams params{};

  Launch(const checks::AttentionSizes& sizes, const Tensor& q, const plan::DecodeAttnCudaPlan& plan,
         std::optional<double> scale)
      : out(empty({sizes.batch, 1, sizes.query_heads, sizes.head_dim}, q.scalar_type(), q)),
        lse(empty({sizes.batch, sizes.query_heads, 1}, ScalarType::Float, q)),
        partial_out(empty({plan.partials, kDecodeHeads, sizes.head_dim}, ScalarType::Float, q)),
        partial_lse(empty({plan.partials, kDecodeHeads}, ScalarType::Float, q)) {
    params.q = q.const_data_ptr();
    copy_strides(q, params.q_stride);
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
    params.scale_log2 = static_cast<float>(ops::scale_or_default(scale, sizes.head_dim)) * kLog2E;
    params.element = element_of(q);
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

  ops::TensorPair result() { return {aten::transpose(out, 1, 2), lse}; }
};

QuantizedSegment segment_of(const Tensor& packed, const Tensor& blocks, quantized::Bits bits) {
  QuantizedSegment segment{};
  segment.packed = static_cast<const std::uint8_t*>(packed.const_data_ptr());
  copy_strides(packed, segment.stride);
  segment.blocks = blocks.const_data_ptr<std::int32_t>();
  segment.blocks_stride = blocks.stride(0);
  segment.capacity = static_cast<int>(packed.size(2));
  segment.bits = bits;
  return segment;
}

ops::Implementation explain(const Tensor& q) {
  return implementation_of(KernelFamily::kSm80, plan::plan_decode_attn_cuda(problem_of(sizes_like(q), q, true)).reason);
}

ops::Implementation explain_quantized(const Tensor& q) {
  constexpr int kBlocks = 1;
  constexpr quantized::Bits kHighBits{4, 4}, kLowBits{4, 2};
  const auto plan = plan::plan_decode_attn_quantized_cuda(problem_of(sizes_like(q), q, true),
                                                          {kBlocks, kBlocks, kHighBits, kLowBits});
  return plan.reason.empty() ? implementation_of(KernelFamily::kSm80, "")
                             : ops::Implementation{"unavailable", plan.reason};
}

// Nothing where no kernel takes these inputs.
std::optional<ops::TensorPair> run(const ops::DecodeAttnArgs& args, const checks::AttentionSizes& sizes) {
  const DeviceGuard guard(args.q.get_device_index());
  const auto plan = plan::plan_decode_attn_cuda(
      problem_of(sizes, args.q, rows_are_aligned(args.k_cache) && rows_are_aligned(args.v_cache)));
  if (!plan.reason.empty()) {
    return std::nullopt;
  }
  Launch launch(sizes, args.q, plan, args.scale);
  launch.set_cache(args.k_cache, args.v_cache, args.lengths);
  check_launch("decode_attn", launch_decode_attn(launch.params, stream_of(args.q)));
  return launch.result();
}

ops::TensorPair run(const ops::DecodeAttnQuantizedArgs& args, const ops::QuantizedSizes& sizes) {
  constexpr const char* kOp = "decode_attn_quantized";
  const DeviceGuard guard(args.q.get_device_index());
  const bool recent = sizes.tokens > 0;
  const bool aligned = rows_are_aligned(args.high) && rows_are_aligned(args.low) &&
                       (!recent || (rows_are_aligned(*args.k_recent) && rows_are_aligned(*args.v_recent)));
  const auto plan = plan::plan_decode_attn_quantized_cuda(
      problem_of(sizes, args.q, aligned), {args.high.size(2), args.low.size(2), sizes.high_bits, sizes.low_bits});
  if (!plan.reason.empty()) {
    checks::fail(kOp, "cannot run on ", "this GPU: ", plan.reason);
  }
  Launch launch(sizes, args.q, plan, args.scale);
  if (recent) {
    launch.set_cache(*args.k_recent, *args.v_recent, *args.recent_lengths);
  }
  DecodeAttnQuantizedParams params{};
  params.attn = launch.params;
  params.segments[0] = segment_of(args.high, args.high_blocks, sizes.high_bits);
  params.segments[1] = segment_of(args.low, args.low_blocks, sizes.low_bits);
  params.v_factor = args.v_factor.const_data_ptr<float>();
  copy_strides(args.v_factor, params.v_factor_stride);
  check_launch(kOp, launch_decode_attn_quantized(params, stream_of(args.q)));
  return launch.result();
}

}  // namespace
}  // namespace cuda
#else
namespace cpu {
namespace {

// A row at a time: its tokens as float32, one attention over all of them.
TensorPair decode_attn_quantized(const ops::DecodeAttnQuantizedArgs& args, const ops::QuantizedSizes& sizes) {
  const Tensor& q = args.q;
  const double scale = ops::scale_or_default(args.scale, sizes.head_dim);
  const Segment segments[] = {{args.high, args.high_blocks, sizes.high_bits},
                              {args.low, args.low_blocks, sizes.low_bits}};
  const auto [out, lse] = ops::nothing(sizes, q);
  for (std::int64_t b = 0; b < sizes.batch; ++b) {
    const std::int64_t recent = args.recent_lengths ? host_count(*args.recent_lengths, b, sizes.tokens) : 0;
    std::int64_t tokens = recent;
    for (const Segment& segment : segments) {
      tokens += segment_tokens(segment, b);
    }
    if (tokens == 0) {
      continue;
    }
    const aten::Sizes shape{sizes.kv_heads, tokens, sizes.head_dim};
    const Tensor k = aten::zeros(shape, aten::ScalarType::Float, q.device()),
                 v = aten::zeros(shape, aten::ScalarType::Float, q.device());
    std::int64_t first = 0;
    for (const Segment& segment : segments) {
      dequantize(segment, b, args.v_factor, q, k, v, first);
      first += segment_tokens(segment, b);
    }
    if (recent > 0) {
      aten::copy_into(aten::slice(k, 1, first, recent), aten::slice(aten::select(*args.k_recent, 0, b), 1, 0, recent));
      aten::copy_into(aten::slice(v, 1, first, recent), aten::slice(aten::select(*args.v_recent, 0, b), 1, 0, recent));
    }
    const auto [row, row_lse] = decode_attn(
        aten::to(aten::slice(q, 0, b, 1), aten::ScalarType::Float), aten::unsqueeze(k, 0), aten::unsqueeze(v, 0),
        aten::full({1}, static_cast<double>(tokens), aten::ScalarType::Int, q.device()), scale);
    aten::copy_into(aten::select(out, 0, b), aten::select(row, 0, 0));
    aten::copy_into(aten::select(lse, 0, b), aten::select(row_lse, 0, 0));
  }
  return {out, lse};
}

}  // namespace
}  // namespace cpu
#endif

namespace ops {

static TensorPair decode_attn(const DecodeAttnArgs& args) {
  const auto sizes = check(args);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return nothing(sizes, args.q);
  }
#ifdef ZIPVL_CUDA_OPS
  if (auto result = cuda::run(args, sizes)) {
    return *result;
  }
#endif
  return cpu::decode_attn(args.q, args.k_cache, args.v_cache, args.lengths,
                          scale_or_default(args.scale, sizes.head_dim));
}

static TensorPair decode_attn_quantized(const DecodeAttnQuantizedArgs& args) {
  const auto sizes = check(args);
  if (sizes.batch == 0) {
    return nothing(sizes, args.q);
  }
#ifdef ZIPVL_CUDA_OPS
  return cuda::run(args, sizes);
#else
  return cpu::decode_attn_quantized(args, sizes);
#endif
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(decode_attn,
         "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, *, float? scale=None) "
         "-> (Tensor out, Tensor lse)",
         &zipvl::cuda::explain)
ZIPVL_OP(decode_attn_quantized,
         "(Tensor q, Tensor high, Tensor high_blocks, Tensor low, Tensor low_blocks, Tensor v_factor, *, "
         "int[2] high_bits=4, int[2] low_bits=[4, 2], Tensor? k_recent=None, Tensor? v_recent=None, "
         "Tensor? recent_lengths=None, float? scale=None) -> (Tensor out, Tensor lse)",
         &zipvl::cuda::explain_quantized)
