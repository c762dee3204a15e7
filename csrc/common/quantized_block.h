// The bytes of a quantised cache, described once: code that packs and code that unpacks, on the CPU and on CUDA, takes
// every place from here. docs/cache.md draws it. Layout after ZipCache (arXiv 2405.14256): keys per channel,
// values per token after a normalisation per channel.
//
// A block holds 64 tokens of one key/value head and needs nothing else to be read, but the channels' factor:
//
//   header       16 bytes: int32 tokens (1 to 64), zeros
//   key scale    [D] elements, in parameter order      k = scale[d] * code + zero[d]
//   key zero     [D] elements, in parameter order
//   value scale  [64] elements, by token               v = factor[d] * (scale[t] * code + zero[t])
//   value zero   [64] elements, by token
//   key codes    64 * D * (bits of a key) / 8 bytes, in 32-bit words
//   value codes  64 * D * (bits of a value) / 8 bytes, likewise
//
// Elements have the model's dtype. Words are in the order in which a warp's mma.m16n8k16 takes its A operand, with 16
// tokens by 16 channels of keys, and 16 channels by 16 tokens of values; lane (i, j) = (lane / 4, lane % 4) reads four
// words at once, one of each 16 tokens.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/math.h"

namespace zipvl::quantized {

constexpr int kBlockTokens = 64;
constexpr int kHeaderBytes = 16;      // keeps all that follows at multiples of 16 bytes
constexpr int kChannelMultiple = 32;  // at 2 bits a word holds codes of 32 channels

// Widths of a segment's codes.
struct Bits {
  int keys, values;
};

// The widths that a segment may have. Attention is exponential in keys, so they may have more bits than values.
constexpr Bits kSupportedBits[] = {{2, 2}, {4, 2}, {4, 4}, {8, 8}};

// Blocks that a segment made of up to `tokens` tokens has room for. One more than they can fill: with one block or more
// a program traced for any number of tokens would have to ask whether it is exactly one.
ZIPVL_HOST_DEVICE constexpr std::int64_t block_capacity(std::int64_t tokens) {
  return ceil_div<std::int64_t>(tokens, kBlockTokens) + 1;
}

// Where the parts of a block begin, in bytes, and its size.
struct BlockLayout {
  std::int64_t k_scale, k_zero, v_scale, v_zero, k_codes, v_codes, bytes;
};

ZIPVL_HOST_DEVICE constexpr BlockLayout block_layout(std::int64_t head_dim, Bits bits, std::int64_t element_bytes) {
  BlockLayout layout{};
  layout.k_scale = kHeaderBytes;
  layout.k_zero = layout.k_scale + head_dim * element_bytes;
  layout.v_scale = layout.k_zero + head_dim * element_bytes;
  layout.v_zero = layout.v_scale + kBlockTokens * element_bytes;
  layout.k_codes = layout.v_zero + kBlockTokens * element_bytes;
  layout.v_codes = layout.k_codes + kBlockTokens * head_dim * bits.keys / 8;
  layout.bytes = layout.v_codes + kBlockTokens * head_dim * bits.values / 8;
  return layout;
}

// Where channel d's key scale and zero stand: the eight channels that lane j holds of 32 lie together.
ZIPVL_HOST_DEVICE constexpr int parameter_place(int d) {
  const int j = d % 8 / 2;
  return d / 32 * 32 + j * 8 + d / 16 % 2 * 4 + d / 8 % 2 * 2 + d % 2;
}

// Where a code stands: `width` bits of word `word` from bit `shift` on. Codes of 8 bits lie in two places of 4 bits,
// the upper half `kUpperHalf` words after the lower one.
struct CodePlace {
  int word, shift, width;
};
constexpr int kUpperHalf = 128;

// row: which of 16 rows of the operand (a key's token, a value's channel); column: which of 16 columns.
ZIPVL_HOST_DEVICE constexpr CodePlace code_place(int bits, int token, int d, int row, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int reg = row / 8 + column / 8 * 2;  // of the operand's four
  const int half = column % 2;               // of the register's two
  const int tile = d / 16;
  if (bits == 2) {
    return {(tile / 2 * 32 + lane) * 4 + token / 16, 2 * (reg + 4 * (tile % 2)) + 16 * half, 2};
  }
  return {(tile * (bits / 4) * 32 + lane) * 4 + token / 16, 4 * reg + 16 * half, 4};
}
ZIPVL_HOST_DEVICE constexpr CodePlace key_code_place(int bits, int token, int d) {
  return code_place(bits, token, d, token % 16, d % 16);
}
ZIPVL_HOST_DEVICE constexpr CodePlace value_code_place(int bits, int token, int d) {
  return code_place(bits, token, d, d % 16, token % 16);
}

// The step between codes of a range; the caller rounds it to the element's dtype before it is used.
ZIPVL_HOST_DEVICE inline float step_of(float lowest, float highest, int bits) {
  return (highest - lowest) / static_cast<float>((1 << bits) - 1);
}

// The code of x for a rounded scale and zero: 0 where the scale is 0. In float32 and correctly rounded, so that the
// CPU and CUDA agree bit for bit.
ZIPVL_HOST_DEVICE inline std::uint32_t code_of(float x, float scale, float zero, int bits) {
  const float max_code = static_cast<float>((1 << bits) - 1);
  const float steps = scale > 0.0F ? rintf((x - zero) / scale) : 0.0F;
  return static_cast<std::uint32_t>(fminf(fmaxf(steps, 0.0F), max_code));
}

// The factor of a channel whose largest value is `largest` in absolute value.
ZIPVL_HOST_DEVICE inline float channel_factor(float largest) { return largest > 0.0F ? sqrtf(largest) : 1.0F; }

}  // namespace zipvl::quantized
