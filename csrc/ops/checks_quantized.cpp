// The checks of quantize_kv and decode_attn_quantized.
#include "common/quantized_block.h"
#include "ops/checks.h"

namespace zipvl::checks {
namespace {

void bits(const char* op, const char* name, std::int64_t value) {
  if (value != 2 && value != 4 && value != 8) {
    fail(op, name, " must be 2, 4 or 8, got ", value);
  }
}

void quantized_head_dim(const char* op, Named argument) {
  const std::int64_t head_dim = argument.tensor.size(3);
  if (head_dim % quantized::kChannelMultiple != 0) {
    fail(op, argument.name, " must have a head dim that is a multiple of ", quantized::kChannelMultiple, ", got ",
         head_dim);
  }
}

std::int64_t element_bytes(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

// packed [B, Hkv, M, bytes] uint8 and blocks [B] int32
void segment(const char* op, const Tensor& q, Named packed, Named blocks, std::int64_t kv_heads,
             std::int64_t segment_bits) {
  const Tensor& bytes = packed.tensor;
  dtype(op, packed, ScalarType::Byte);
  if (bytes.dim() != 4) {
    fail(op, packed.name, " must have 4 dimensions [B, Hkv, blocks, bytes], got ", bytes.dim());
  }
  shape(op, packed,
        {q.size(0), kv_heads, bytes.size(2),
         quantized::block_layout(q.size(3), static_cast<int>(segment_bits), element_bytes(q)).bytes});
  if (bytes.numel() > 0 && bytes.stride(3) != 1) {
    fail(op, packed.name, " must have a last stride of 1, got ", bytes.stride(3), "; call .contiguous() first");
  }
  same_device(op, q, packed);
  dtype(op, blocks, ScalarType::Int);
  shape(op, blocks, {q.size(0)});
  same_device(op, q, blocks);
}

void factor(const char* op, const Tensor& v_factor, const Tensor& like, std::int64_t kv_heads) {
  const Named argument{"v_factor", v_factor};
  dtype(op, argument, ScalarType::Float);
  shape(op, argument, {like.size(0), kv_heads, like.size(3)});
  same_device(op, like, argument);
}

void recent(const char* op, const Tensor& q, std::int64_t kv_heads, const std::optional<Tensor>& k_recent,
            const std::optional<Tensor>& v_recent, const std::optional<Tensor>& recent_lengths) {
  if (k_recent.has_value() != v_recent.has_value() || k_recent.has_value() != recent_lengths.has_value()) {
    fail(op, "k_recent, v_recent and recent_lengths must be given together, got ", k_recent ? "k_recent " : "",
         v_recent ? "v_recent " : "", recent_lengths ? "recent_lengths " : "", "alone");
  }
  if (!k_recent) {
    return;
  }
  const AttentionSizes sizes = attention_inputs(op, q, {"k_recent", *k_recent}, Named{"v_recent", *v_recent});
  shape(op, {"k_recent", *k_recent}, {sizes.batch, kv_heads, sizes.tokens, sizes.head_dim});
  const Named lengths_argument{"recent_lengths", *recent_lengths};
  dtype(op, lengths_argument, ScalarType::Int);
  shape(op, lengths_argument, {q.size(0)});
  same_device(op, q, lengths_argument);
}

}  // namespace

void quantize_kv(const char* op, const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count,
                 std::int64_t high_bits, std::int64_t low_bits, const std::optional<Tensor>& v_factor,
                 const std::optional<Tensor>& token_mask) {
  kv_pair(op, {"k", k}, {"v", v});
  quantized_head_dim(op, {"k", k});
  selection(op, k, index, count, k.size(0), k.size(2));
  bits(op, "high_bits", high_bits);
  bits(op, "low_bits", low_bits);
  if (v_factor) {
    factor(op, *v_factor, k, k.size(1));
  }
  mask(op, "token_mask", token_mask, k, k.size(0), k.size(2));
}

AttentionSizes decode_attn_quantized(const char* op, const Tensor& q, const Tensor& high, const Tensor& high_blocks,
                                     const Tensor& low, const Tensor& low_blocks, const Tensor& v_factor,
                                     std::int64_t high_bits, std::int64_t low_bits,
                                     const std::optional<Tensor>& k_recent, const std::optional<Tensor>& v_recent,
                                     const std::optional<Tensor>& recent_lengths, std::optional<double> scale_value) {
  query(op, q);
  query_tokens(op, q, 1);
  quantized_head_dim(op, {"q", q});
  bits(op, "high_bits", high_bits);
  bits(op, "low_bits", low_bits);
  if (high.dim() != 4) {
    fail(op, "high must have 4 dimensions [B, Hkv, blocks, bytes], got ", high.dim());
  }
  const std::int64_t kv_heads = high.size(1);
  if (q.size(1) < 1 || kv_heads < 1 || q.size(1) % kv_heads != 0) {
    fail(op, "high has ", kv_heads, " heads, which does not divide q's ", q.size(1), " query heads");
  }
  segment(op, q, {"high", high}, {"high_blocks", high_blocks}, kv_heads, high_bits);
  segment(op, q, {"low", low}, {"low_blocks", low_blocks}, kv_heads, low_bits);
  factor(op, v_factor, q, kv_heads);
  recent(op, q, kv_heads, k_recent, v_recent, recent_lengths);
  scale(op, scale_value);
  return {q.size(0), q.size(1), kv_heads, 1, q.size(3)};
}

}  // namespace zipvl::checks
