#include <limits>

#include "cpu/kernels.h"
#include "cpu/quantized_cache.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/defaults.h"
#include "ops/ops.h"

namespace zipvl::ops {

using aten::ScalarType;

// A row at a time: its tokens as float32, one attention over all of them.
std::tuple<Tensor, Tensor> decode_attn_quantized(
    const Tensor& q, const Tensor& high, const Tensor& high_blocks, const Tensor& low, const Tensor& low_blocks,
    const Tensor& v_factor, std::int64_t high_bits, std::int64_t low_bits, const std::optional<Tensor>& k_recent,
    const std::optional<Tensor>& v_recent, const std::optional<Tensor>& recent_lengths, std::optional<double> scale) {
  const auto sizes =
      checks::decode_attn_quantized("decode_attn_quantized", q, high, high_blocks, low, low_blocks, v_factor, high_bits,
                                    low_bits, k_recent, v_recent, recent_lengths, scale);
  const double factor = scale_or_default(scale, sizes.head_dim);
  const cpu::Segment segments[] = {{high, high_blocks, static_cast<int>(high_bits)},
                                   {low, low_blocks, static_cast<int>(low_bits)}};
  const Tensor out = aten::zeros({sizes.batch, 1, sizes.query_heads, sizes.head_dim}, q.scalar_type(), q.device());
  const Tensor lse = aten::full({sizes.batch, sizes.query_heads, 1}, -std::numeric_limits<double>::infinity(),
                                ScalarType::Float, q.device());
  for (std::int64_t b = 0; b < sizes.batch; ++b) {
    const std::int64_t recent = recent_lengths ? aten::host_count(*recent_lengths, b, k_recent->size(2)) : 0;
    std::int64_t tokens = recent;
    for (const cpu::Segment& segment : segments) {
      tokens += cpu::segment_tokens(segment, b);
    }
    if (tokens == 0) {
      continue;
    }
    const aten::Sizes shape{sizes.kv_heads, tokens, sizes.head_dim};
    const Tensor k = aten::zeros(shape, ScalarType::Float, q.device()),
                 v = aten::zeros(shape, ScalarType::Float, q.device());
    std::int64_t first = 0;
    for (const cpu::Segment& segment : segments) {
      cpu::dequantize(segment, b, v_factor, q, k, v, first);
      first += cpu::segment_tokens(segment, b);
    }
    if (recent > 0) {
      aten::copy_into(aten::slice(k, 1, first, recent), aten::slice(aten::select(*k_recent, 0, b), 1, 0, recent));
      aten::copy_into(aten::slice(v, 1, first, recent), aten::slice(aten::select(*v_recent, 0, b), 1, 0, recent));
    }
    const auto [row, row_lse] = aten::decode_attn(
        aten::to(aten::slice(q, 0, b, 1), ScalarType::Float), aten::unsqueeze(k, 0), aten::unsqueeze(v, 0),
        aten::full({1}, static_cast<double>(tokens), ScalarType::Int, q.device()), factor);
    aten::copy_into(aten::select(out, 0, b), aten::select(aten::transpose(row, 1, 2), 0, 0));
    aten::copy_into(aten::select(lse, 0, b), aten::select(row_lse, 0, 0));
  }
  return {aten::transpose(out, 1, 2), lse};
}

}  // namespace zipvl::ops
