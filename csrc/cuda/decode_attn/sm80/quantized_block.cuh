// A block of 64 quantised tokens in shared memory: fetched by one warp, attended to by it. Codes are not dequantised:
// keys' scales go into the queries and values' scales into the weights, both once for many codes, and what is left are
// products of small integers, which 16-bit elements hold exactly. Layout of a block: common/quantized_block.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/quantized_block.h"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode_attn::sm80 {

// What a code's bits stand for in the lower bits of an element. float16: the subnormal code * 2**-24,
// which tensor cores take as it is. bfloat16, whose subnormals are too small for float32 sums: 128 + code, the bits of
// 128 set, and 128 times the queries is taken off again. Codes there have 4 bits; of 8, each half is multiplied by
// itself.
template <typename ElementType>
struct CodeElement;
template <>
struct CodeElement<__half> {
  static constexpr std::uint32_t kBits = 0;
  static constexpr float kUnit = 16777216.0F;
  static constexpr int kMantissa = 10;
};
template <>
struct CodeElement<__nv_bfloat16> {
  static constexpr std::uint32_t kBits = 0x43004300;
  static constexpr float kUnit = 1.0F;
  static constexpr int kMantissa = 7;
};

template <typename ElementType>
__device__ __forceinline__ std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<ElementType, __half>, __half2, __nv_bfloat162>;
  const Pair product = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const std::uint32_t&>(product);
}

template <typename ElementType>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t x) {
  if constexpr (std::is_same_v<ElementType, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(x));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
  }
}

// Codes of a word as the four registers of an operand. Rows 8 to 15 of it (registers 1 and 3) need no shift of their
// own where the mantissa holds two codes: they stay where they are, kUpper times as much as they stand for.
template <typename ElementType, int Bits>
struct Unpack {
  static constexpr int kWidth = Bits == 2 ? 2 : 4;
  static constexpr bool kStay = 2 * kWidth <= CodeElement<ElementType>::kMantissa;
  static constexpr int kUpper = kStay ? 1 << kWidth : 1;
  static constexpr std::uint32_t kMask = Bits == 2 ? 0x00030003U : 0x000F000FU;

  // odd: of two tiles in the word. set: CodeElement::kBits, in a register, where one instruction masks and sets.
  static __device__ __forceinline__ void run(std::uint32_t (&a)[4], std::uint32_t word, int odd, std::uint32_t set) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const std::uint32_t moved = word >> (kWidth * (4 * odd + 2 * column));
      a[2 * column] = (moved & kMask) | set;
      a[2 * column + 1] = (kStay ? moved & kMask << kWidth : moved >> kWidth & kMask) | set;
    }
  }
};

template <typename ElementType, int D, int KeyBits, int ValueBits>
struct QuantizedTile {
  static constexpr quantized::Bits kBits{KeyBits, ValueBits};
  static constexpr quantized::BlockLayout kLayout = quantized::block_layout(D, kBits, 2);
  static constexpr int kBytes = static_cast<int>(kLayout.bytes);
  static constexpr int kTokenTiles = quantized::kBlockTokens / 16;
  using Code = CodeElement<ElementType>;
  using Keys = Unpack<ElementType, KeyBits>;
  using Values = Unpack<__half, ValueBits>;
  // How many times too large the outputs of channels 16 m + 8 + i are; 8 bits have both halves of a code in one
  // operand.
  static constexpr float kValueUpper = ValueBits == 8 ? 1.0F : static_cast<float>(Values::kUpper);

  // Bytes [First, End) of a block. Both addresses are the lane's: 16 times it past the block's begin.
  template <int First, int End>
  static __device__ __forceinline__ void fetch(std::uint32_t target, const std::uint8_t* block, int lane) {
#pragma unroll
    for (int at = First; at < End; at += 512) {
      if (at + 512 <= End || at + lane * 16 < End) {
        ptx::cp_async_16(target + at, block + at);
      }
    }
  }
  // The header, all scales and zeros, and the codes of keys.
  static __device__ __forceinline__ void fetch_keys(std::uint32_t target, const std::uint8_t* block, int lane) {
    fetch<0, static_cast<int>(kLayout.v_codes)>(target, block, lane);
  }
  static __device__ __forceinline__ void fetch_values(std::uint32_t target, const std::uint8_t* block, int lane) {
    fetch<static_cast<int>(kLayout.v_codes), kBytes>(target, block, lane);
  }

  // The words of channel tile `tile` (of tiles `tile` and `tile + 1` at 2 bits), one of each 16 tokens; upper: of the
  // upper halves of 8 bits.
  template <int Bits>
  static __device__ __forceinline__ uint4 words(const unsigned char* codes, int lane, int tile, bool upper = false) {
    const int row = Bits == 2 ? tile / 2 : Bits == 4 ? tile : 2 * tile + (upper ? 1 : 0);
    return reinterpret_cast<const uint4*>(codes)[row * 32 + lane];
  }

  // The loads of later channels must not be moved before the products of earlier ones: the registers do not hold them,
  // and they would be spilled.
  static __device__ __forceinline__ void hold_loads_back() { __syncwarp(); }

  // Scores of all 64 tokens, base 2. queries: as fetched by Queries. code_bits: Code::kBits, unknown to the compiler:
  // of two constants it would make two instructions, one that masks and one that sets.
  static __device__ __forceinline__ void scores(float (&s)[kTokenTiles][4], std::uint32_t queries,
                                                const unsigned char* block, float scale_log2, std::uint32_t code_bits,
                                                int lane) {
    const int j = lane % 4;
    const auto* scales = reinterpret_cast<const uint4*>(block + kLayout.k_scale);
    const auto* zeros = reinterpret_cast<const uint4*>(block + kLayout.k_zero);
    const unsigned char* codes = block + kLayout.k_codes;
    // What all tokens of the block have in common: the zeros', the same in every row, and what the set bits add.
    float lower_zeros[4] = {}, upper_zeros[4] = {}, set[4] = {};
    const std::uint32_t bits = Code::kBits == 0 ? 0 : code_bits;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0.0F;
    }
#pragma unroll
    for (int pair = 0; pair < D / 32; ++pair) {
      hold_loads_back();
      const uint4 scale = scales[pair * 4 + j], zero = zeros[pair * 4 + j];
      const std::uint32_t scale_of[2][2] = {{scale.x, scale.y}, {scale.z, scale.w}};
      uint4 word = words<KeyBits>(codes, lane, 2 * pair);
      std::uint32_t q[4];
      Queries<ElementType, D>::load_halves(q, queries, pair, lane);
      // As they were loaded: rows 0 to 7 are the zeros of channels 0 to 7 of both tiles, rows 8 to 15 of 8 to 15.
      const std::uint32_t zeros_of[4] = {zero.x, zero.y, zero.z, zero.w};
      ptx::mma_16x8x16<ElementType>(lower_zeros, zeros_of, q[0], q[1]);
      ptx::mma_16x8x16<ElementType>(upper_zeros, zeros_of, q[2], q[3]);
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int k = 2 * pair + odd;
        const std::uint32_t low = multiply_pairs<ElementType>(q[odd], scale_of[odd][0]);
        const std::uint32_t high = multiply_pairs<ElementType>(q[odd + 2], scale_of[odd][1]);
        if (KeyBits != 2 && odd == 1) {
          word = words<KeyBits>(codes, lane, k);
        }
        add_codes(s, set, word, KeyBits == 2 ? odd : 0, bits, low, high);
        if constexpr (KeyBits == 8) {
          constexpr std::uint32_t kSixteen = std::is_same_v<ElementType, __half> ? 0x4C004C00U : 0x41804180U;
          add_codes(s, set, words<KeyBits>(codes, lane, k, true), 0, bits, multiply_pairs<ElementType>(low, kSixteen),
                    multiply_pairs<ElementType>(high, kSixteen));
        }
      }
    }
    const float lower = Code::kUnit * scale_log2, upper = lower / Keys::kUpper;
    const float common[2] = {lower_zeros[0] + upper_zeros[2], lower_zeros[1] + upper_zeros[3]};
    const float shared[2] = {(common[0] - set[0] * Code::kUnit) * scale_log2,
                             (common[1] - set[1] * Code::kUnit) * scale_log2};
    const float shared_upper[2] = {(common[0] - set[0] * (Code::kUnit / Keys::kUpper)) * scale_log2,
                                   (common[1] - set[1] * (Code::kUnit / Keys::kUpper)) * scale_log2};
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[t][h] = fmaf(s[t][h], lower, shared[h]);
        s[t][h + 2] = fmaf(s[t][h + 2], upper, shared_upper[h]);
      }
    }
  }

  // Adds the products of one channel tile's codes and the scaled queries (low, high).
  static __device__ __forceinline__ void add_codes(float (&s)[kTokenTiles][4], float (&set)[4], const uint4& word,
                                                   int odd, std::uint32_t bits, std::uint32_t low, std::uint32_t high) {
    const std::uint32_t of_tile[kTokenTiles] = {word.x, word.y, word.z, word.w};
    if constexpr (Code::kBits != 0) {
      const std::uint32_t ones[4] = {bits, bits, bits, bits};
      ptx::mma_16x8x16<ElementType>(set, ones, low, high);
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      std::uint32_t codes[4];
      Keys::run(codes, of_tile[t], odd, bits);
      ptx::mma_16x8x16<ElementType>(s[t], codes, low, high);
    }
  }

  // Scores become the weights of the value codes. They hold the tokens' scales and are float16 whatever the model's
  // dtype: they are at most the scale, which is at most 2 / 3 of the square root of the largest value.
  static __device__ __forceinline__ void softmax_weights(std::uint32_t (&weights)[kTokenTiles][2], WarpState<D>& state,
                                                         std::uint32_t queries, const unsigned char* block,
                                                         float scale_log2, std::uint32_t code_bits, int lane) {
    float s[kTokenTiles][4];
    scores(s, queries, block, scale_log2, code_bits, lane);
    if (const int tokens = *reinterpret_cast<const int*>(block); tokens < quantized::kBlockTokens) {
      apply_mask(s, tokens, lane);
    }
    state.online_softmax(s);
    std::uint32_t scales[kTokenTiles], zeros[kTokenTiles];
    load_by_token(scales, block + kLayout.v_scale, lane);
    load_by_token(zeros, block + kLayout.v_zero, lane);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const float2 scale = unpack_pair<ElementType>(scales[t]), zero = unpack_pair<ElementType>(zeros[t]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        state.offset[h] += s[t][h] * zero.x;
        state.offset[h] += s[t][h + 2] * zero.y;
        s[t][h] *= scale.x;
        s[t][h + 2] *= scale.y;
      }
      weights_operand<__half>(weights[t], s[t]);
    }
  }

  // Of the 64 elements at `values`, those of tokens 16 t + i and 16 t + 8 + i: eight tokens are a row, and a transposed
  // matrix of two rows, each four times, gives a lane the same column of both.
  static __device__ __forceinline__ void load_by_token(std::uint32_t (&x)[kTokenTiles], const unsigned char* values,
                                                       int lane) {
    ptx::ldmatrix_trans(x, ptx::shared_address(values) + (lane / 8 * 2 + lane % 2) * 16);
  }

  // Adds the weighted value codes, in units of 2**-24, and kValueUpper times too much of channels 16 m + 8 + i.
  static __device__ __forceinline__ void add_values(WarpState<D>& state, const std::uint32_t (&weights)[kTokenTiles][2],
                                                    const unsigned char* block, int lane) {
    const unsigned char* codes = block + kLayout.v_codes;
#pragma unroll
    for (int pair = 0; pair < D / 32; ++pair) {
      hold_loads_back();
      uint4 word = words<ValueBits>(codes, lane, 2 * pair), above{};
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int m = 2 * pair + odd;
        if (ValueBits != 2 && odd == 1) {
          word = words<ValueBits>(codes, lane, m);
        }
        if constexpr (ValueBits == 8) {
          hold_loads_back();
          above = words<ValueBits>(codes, lane, m, true);
        }
        const std::uint32_t lower_of[kTokenTiles] = {word.x, word.y, word.z, word.w};
        const std::uint32_t upper_of[kTokenTiles] = {above.x, above.y, above.z, above.w};
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          std::uint32_t a[4];
          if constexpr (ValueBits == 8) {
            join_halves(a, lower_of[t], upper_of[t]);
          } else {
            Values::run(a, lower_of[t], ValueBits == 2 ? odd : 0, 0);
          }
          ptx::mma_16x8x16<__half>(state.out[m], a, weights[t][0], weights[t][1]);
        }
      }
    }
  }

  // Codes of 8 bits from the words of their lower and their upper halves.
  static __device__ __forceinline__ void join_halves(std::uint32_t (&a)[4], std::uint32_t lower, std::uint32_t upper) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      a[n] = (lower >> 4 * n & Values::kMask) | (upper >> 4 * n & Values::kMask) << 4;
    }
  }
};

// The factors of a head's channels, channel 32 r + lane in register r: early, so that they are there at the end.
template <int D>
__device__ __forceinline__ void load_factors(float (&factors)[D / 32], const float* factor, std::int64_t stride,
                                             int lane) {
#pragma unroll
  for (int r = 0; r < D / 32; ++r) {
    factors[r] = factor[(32 * r + lane) * stride];
  }
}

// Turns what the codes summed to into values. upper: how many times too large channels 16 m + 8 + i are; factors: of
// load_factors. Every lane of a warp calls.
template <int D>
__device__ __forceinline__ void finish_codes(WarpState<D>& state, float upper, const float (&factors)[D / 32],
                                             int lane) {
  const int i = lane / 4;
  constexpr float kUnit = CodeElement<__half>::kUnit;
  const float units[2] = {kUnit, kUnit / upper};
  const float offset[2] = {column_sum(state.offset[0]), column_sum(state.offset[1])};
#pragma unroll
  for (int m = 0; m < D / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = __shfl_sync(kAllLanes, factors[m / 2], m % 2 * 16 + half * 8 + i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& out = state.out[m][2 * half + h];
        out = factor * (out * units[half] + offset[h]);
      }
    }
  }
}

}  // namespace zipvl::cuda::decode_attn::sm80
