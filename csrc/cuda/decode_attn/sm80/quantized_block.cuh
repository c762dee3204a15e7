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

namespace zipvl::cuda::decode {

// What a code's bits stand for in the lower bits of an element of Element. float16: the subnormal code * 2**-24, which
// tensor cores take as it is. bfloat16, whose subnormals are too small for float32 sums: 128 + code, the bits of 128
// set, and 128 times the queries is taken off again. Codes there have 4 bits; of 8, each half is multiplied by itself.
template <typename Element>
struct CodeElement;
template <>
struct CodeElement<__half> {
  static constexpr std::uint32_t kBits = 0;
  static constexpr float kUnit = 16777216.0F;
};
template <>
struct CodeElement<__nv_bfloat16> {
  static constexpr std::uint32_t kBits = 0x43004300;
  static constexpr std::uint32_t kMinusBits = 0xC300C300;  // -128 twice
  static constexpr float kUnit = 1.0F;
};

template <typename Element>
__device__ __forceinline__ std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair product = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const std::uint32_t&>(product);
}

// The four registers of the tile at bit `shift` of a word: Mask picks the codes of both halves.
template <int Bits>
__device__ __forceinline__ void unpack(std::uint32_t (&a)[4], std::uint32_t word, int first, std::uint32_t set) {
  constexpr std::uint32_t kMask = Bits == 2 ? 0x00030003U : 0x000F000FU;
  constexpr int kStep = Bits == 2 ? 2 : 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    a[n] = (word >> (kStep * (first + n)) & kMask) | set;
  }
}

template <typename Element, int D, int Bits>
struct QuantizedTile {
  static constexpr quantized::BlockLayout kLayout = quantized::block_layout(D, Bits, 2);
  static constexpr int kBytes = static_cast<int>(kLayout.bytes);
  static constexpr int kTokenTiles = quantized::kBlockTokens / 16;
  using Code = CodeElement<Element>;

  static __device__ __forceinline__ void fetch(std::uint32_t target, const std::uint8_t* block) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 4
    for (int at = lane * 16; at < kBytes; at += 512) {
      ptx::cp_async_16(target + at, block + at);
    }
  }

  // The words of channel tile `tile` (of tiles `tile` and `tile + 1` at 2 bits), one of each 16 tokens; upper: of the
  // upper halves of 8 bits.
  static __device__ __forceinline__ uint4 words(const unsigned char* codes, int tile, bool upper = false) {
    const int row = Bits == 2 ? tile / 2 : Bits == 4 ? tile : 2 * tile + (upper ? 1 : 0);
    return reinterpret_cast<const uint4*>(codes)[row * 32 + static_cast<int>(threadIdx.x % 32)];
  }

  // At head dim 256 the loads of later channels must not be moved before the products of earlier ones: 255 registers
  // do not hold them, and they would be spilled.
  static __device__ __forceinline__ void hold_loads_back() {
    if constexpr (D > 128) {
      __syncwarp();
    }
  }

  // Scores of all 64 tokens, base 2.
  static __device__ __forceinline__ void scores(float (&s)[kTokenTiles][4], const std::uint32_t (&q)[D / 16][2],
                                                const unsigned char* block, float scale_log2) {
    const int j = static_cast<int>(threadIdx.x % 4);
    const auto* scales = reinterpret_cast<const uint4*>(block + kLayout.k_scale);
    const auto* zeros = reinterpret_cast<const uint4*>(block + kLayout.k_zero);
    const unsigned char* codes = block + kLayout.k_codes;
    float common[4] = {};  // what all tokens of the block have in common: the same in every row
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0.0F;
    }
#pragma unroll
    for (int pair = 0; pair < D / 32; ++pair) {
      hold_loads_back();
      const uint4 scale = scales[pair * 4 + j], zero = zeros[pair * 4 + j];
      const std::uint32_t scale_of[2][2] = {{scale.x, scale.y}, {scale.z, scale.w}};
      const std::uint32_t zero_of[2][2] = {{zero.x, zero.y}, {zero.z, zero.w}};
      uint4 word = words(codes, 2 * pair);
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int k = 2 * pair + odd;
        const std::uint32_t zero_row[4] = {zero_of[odd][0], zero_of[odd][0], zero_of[odd][1], zero_of[odd][1]};
        ptx::mma_16x8x16<Element>(common, zero_row, q[k][0], q[k][1]);
        const std::uint32_t low = multiply_pairs<Element>(q[k][0], scale_of[odd][0]);
        const std::uint32_t high = multiply_pairs<Element>(q[k][1], scale_of[odd][1]);
        if (Bits != 2 && odd == 1) {
          word = words(codes, k);
        }
        add_codes(s, common, word, Bits == 2 ? 4 * odd : 0, low, high);
        if constexpr (Bits == 8) {
          constexpr std::uint32_t kSixteen = std::is_same_v<Element, __half> ? 0x4C004C00U : 0x41804180U;
          add_codes(s, common, words(codes, k, true), 0, multiply_pairs<Element>(low, kSixteen),
                    multiply_pairs<Element>(high, kSixteen));
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[t][c] = (s[t][c] * Code::kUnit + common[c]) * scale_log2;
      }
    }
  }

  // Adds the products of one channel tile's codes and the scaled queries (low, high).
  static __device__ __forceinline__ void add_codes(float (&s)[kTokenTiles][4], float (&common)[4], const uint4& word,
                                                   int first, std::uint32_t low, std::uint32_t high) {
    const std::uint32_t of_tile[kTokenTiles] = {word.x, word.y, word.z, word.w};
    if constexpr (Code::kBits != 0) {
      const std::uint32_t minus[4] = {Code::kMinusBits, Code::kMinusBits, Code::kMinusBits, Code::kMinusBits};
      ptx::mma_16x8x16<Element>(common, minus, low, high);
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      std::uint32_t codes[4];
      unpack<Bits>(codes, of_tile[t], first, Code::kBits);
      ptx::mma_16x8x16<Element>(s[t], codes, low, high);
    }
  }

  // Adds the weighted value codes, in units of 2**-24. The weights hold the tokens' scales and are float16 whatever the
  // model's dtype: they are at most the scale, which is at most 2 / 3 of the square root of the largest value.
  static __device__ __forceinline__ void add_values(WarpState<D>& state, const std::uint32_t (&weights)[kTokenTiles][2],
                                                    const unsigned char* codes) {
#pragma unroll
    for (int pair = 0; pair < D / 32; ++pair) {
      hold_loads_back();
      const uint4 even = words(codes, 2 * pair), odd = Bits == 2 ? even : words(codes, 2 * pair + 1);
      uint4 upper[2] = {};
      if constexpr (Bits == 8) {
        upper[0] = words(codes, 2 * pair, true);
        upper[1] = words(codes, 2 * pair + 1, true);
      }
      const std::uint32_t lower_of[2][kTokenTiles] = {{even.x, even.y, even.z, even.w}, {odd.x, odd.y, odd.z, odd.w}};
      const std::uint32_t upper_of[2][kTokenTiles] = {{upper[0].x, upper[0].y, upper[0].z, upper[0].w},
                                                      {upper[1].x, upper[1].y, upper[1].z, upper[1].w}};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          std::uint32_t a[4];
          unpack<Bits>(a, lower_of[m][t], Bits == 2 ? 4 * m : 0, 0);
          if constexpr (Bits == 8) {
            std::uint32_t above[4];
            unpack<Bits>(above, upper_of[m][t], 0, 0);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              a[n] |= above[n] << 4;
            }
          }
          ptx::mma_16x8x16<__half>(state.out[2 * pair + m], a, weights[t][0], weights[t][1]);
        }
      }
    }
  }

  static __device__ __forceinline__ void attend(WarpState<D>& state, const std::uint32_t (&q)[D / 16][2],
                                                const unsigned char* block, float scale_log2) {
    const int i = static_cast<int>(threadIdx.x % 32) / 4;
    const int tokens = *reinterpret_cast<const int*>(block);
    float s[kTokenTiles][4];
    scores(s, q, block, scale_log2);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        s[t][c] = 16 * t + i + c / 2 * 8 < tokens ? s[t][c] : kNone;
      }
    }
    state.weigh(s);
    const auto* scales = reinterpret_cast<const Element*>(block + kLayout.v_scale);
    const auto* zeros = reinterpret_cast<const Element*>(block + kLayout.v_zero);
    std::uint32_t weights[kTokenTiles][2];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 16 * t + i + c / 2 * 8;
        state.offset[c % 2] += s[t][c] * static_cast<float>(zeros[token]);
        s[t][c] *= static_cast<float>(scales[token]);
      }
      weights_operand<__half>(weights[t], s[t]);
    }
    add_values(state, weights, block + kLayout.v_codes);
  }

  // Turns what the codes summed to into values; factor: of the head's channels.
  static __device__ __forceinline__ void finish(WarpState<D>& state, const float* factor, std::int64_t factor_stride) {
    const int i = static_cast<int>(threadIdx.x % 32) / 4;
    constexpr float kUnit = CodeElement<__half>::kUnit;
    const float offset[2] = {column_sum(state.offset[0]), column_sum(state.offset[1])};
#pragma unroll
    for (int m = 0; m < D / 16; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        state.out[m][c] = factor[(16 * m + i + c / 2 * 8) * factor_stride] * (state.out[m][c] * kUnit + offset[c % 2]);
      }
    }
  }
};

}  // namespace zipvl::cuda::decode
