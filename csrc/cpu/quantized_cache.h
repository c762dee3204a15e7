// Quantising keys and values into the blocks of common/quantized_block.h and back, by loops over memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace zipvl::cpu {

using torch::stable::Tensor;

// k, v [B, Hkv, N, D], index [B, N], count [B] int32, v_factor [B, Hkv, D] float32 or absent, token_mask [B, N] bool or
// absent -> high [B, Hkv, ceil(N / 64) + 1, bytes], blocks [B] int32, low, blocks, v_factor. Bytes of unused blocks are
// 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, int high_bits, int low_bits,
                                                               const std::optional<Tensor>& v_factor,
                                                               const std::optional<Tensor>& token_mask);

// One segment of a quantised cache: packed [B, Hkv, M, bytes] uint8 and the blocks [B] int32 of each row in use.
struct Segment {
  const Tensor& packed;
  const Tensor& blocks;
  int bits;
};

// Tokens of row b in a segment. Counts outside their range are clamped.
std::int64_t segment_tokens(const Segment& segment, std::int64_t b);

// Writes row b's tokens to rows [first, first + segment_tokens) of k, v [Hkv, tokens, D] float32. `like` has the dtype
// that was quantised.
void dequantize(const Segment& segment, std::int64_t b, const Tensor& v_factor, const Tensor& like, const Tensor& k,
                const Tensor& v, std::int64_t first);

}  // namespace zipvl::cpu
