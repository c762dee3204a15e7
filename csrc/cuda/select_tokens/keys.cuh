// A row's scores into registers, as keys: integers in the order of the scores.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/histogram.cuh"

namespace zipvl::cuda::select_tokens {

// Rank keys: the scores in their order, with two values that no score has. A sum that is NaN has positive sign, so that
// no NaN becomes kNotReal.
constexpr std::uint32_t kNotReal = 0, kLargestRank = 0xFF7FFFFFU, kKept = 0xFFFFFFFFU;
constexpr std::uint32_t kSignBit = 0x80000000U;
constexpr std::uint32_t kInfinityBits = 0x7F800000U;  // finite absolute values are below

// A thread's tokens: quads of neighbours, a warp's quads side by side, so that a warp's tokens are kItems * 32 in a
// row.
template <int kItems>
struct Keys {
  static constexpr int kQuads = kItems / 4;
  std::uint32_t budget[kItems];  // bits; 0 where the token is not real or its score negative
  std::uint32_t rank[kItems];

  // The place in the block of a quad's first token.
  static __device__ int place(int quad) {
    return static_cast<int>(threadIdx.x) / kWarpThreads * (32 * kItems) + quad * 128 +
           static_cast<int>(threadIdx.x % kWarpThreads) * 4;
  }
};

// For quads that do not lie side by side, or end within. Apart, so that its code stays out of the usual way.
static __device__ __noinline__ std::uint32_t load_masks_apart(const bool* mask, std::int64_t stride, int n,
                                                              int tokens) {
  std::uint32_t bytes = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    bytes |= n + c < tokens && mask[(n + c) * stride] ? 1U << (8 * c) : 0U;
  }
  return bytes;
}

static __device__ __noinline__ uint4 load_scores_apart(const float* scores, std::int64_t stride, int n, int tokens) {
  const auto bits = [&](int i) { return i < tokens ? __float_as_uint(scores[i * stride]) : 0U; };
  return {bits(n), bits(n + 1), bits(n + 2), bits(n + 3)};
}

// The four masks of a quad in a byte each, 0 or 1.
__device__ inline std::uint32_t load_masks(const bool* mask, std::int64_t stride, bool vectors, int n, int tokens) {
  return vectors && n + 3 < tokens ? *reinterpret_cast<const std::uint32_t*>(mask + n)
                                   : load_masks_apart(mask, stride, n, tokens);
}

__device__ inline void load_scores(std::uint32_t* bits, const float* scores, std::int64_t stride, bool vectors, int n,
                                   int tokens) {
  const uint4 four = vectors && n + 3 < tokens ? *reinterpret_cast<const uint4*>(scores + n)
                                               : load_scores_apart(scores, stride, n, tokens);
  bits[0] = four.x, bits[1] = four.y, bits[2] = four.z, bits[3] = four.w;
}

__device__ inline bool aligned(const void* row, std::int64_t stride, int bytes) {
  return stride == 1 && reinterpret_cast<std::uintptr_t>(row) % bytes == 0;
}

// Scores as they are given.
struct GivenScores {
  static constexpr bool kSigned = true;

  const float *budget, *rank;
  std::int64_t budget_stride, rank_stride;
  bool budget_vectors, rank_vectors;

  __device__ GivenScores(const SelectTokensParams& params, std::int64_t b)
      : budget(params.budget_score + b * params.budget_stride[0]),
        rank(params.rank_score + b * params.rank_stride[0]),
        budget_stride(params.budget_stride[1]),
        rank_stride(params.rank_stride[1]),
        budget_vectors(aligned(budget, budget_stride, 16)),
        rank_vectors(aligned(rank, rank_stride, 16)) {}

  // The bits of the scores of the tokens before `tokens` among the block's, the first of which is `first`.
  template <int kItems>
  __device__ void load(Keys<kItems>& keys, int first, int tokens) const {
#pragma unroll
    for (int quad = 0; quad < kItems / 4; ++quad) {
      const int n = first + Keys<kItems>::place(quad);
      load_scores(keys.budget + 4 * quad, budget, budget_stride, budget_vectors, n, tokens);
      load_scores(keys.rank + 4 * quad, rank, rank_stride, rank_vectors, n, tokens);
    }
  }
};

// The facts about a lane's tokens.
struct LaneSummary {
  std::uint32_t flags;  // bit i: bucket kNotFiniteBucket + i counts it
  std::uint32_t real;   // tokens
};

// Four masks, a byte each, as a bit each.
__device__ inline std::uint32_t bits_of(std::uint32_t bytes) { return (bytes * 0x01020408U) >> 24 & 15U; }

// The keys of the block's tokens, the first of which is `first`; clear() runs while scores are on their way.
template <int kItems, typename Scores, typename Clear>
__device__ LaneSummary load(Keys<kItems>& keys, const Scores& scores, const SelectTokensParams& params, std::int64_t b,
                            int first, const Clear& clear) {
  static_assert(kItems <= 32, "a bit a token");
  const bool* real_mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.mask_stride[0];
  const bool* keep_mask = params.keep_mask == nullptr ? nullptr : params.keep_mask + b * params.keep_stride[0];
  const bool real_vectors = aligned(real_mask, params.mask_stride[1], 4);
  const bool keep_vectors = aligned(keep_mask, params.keep_stride[1], 4);
  const int keep_from = params.keep_from == nullptr ? params.tokens - params.keep_last : params.keep_from[b];
  std::uint32_t all_real = 0, all_kept = 0;  // a bit a token
  scores.load(keys, first, params.tokens);
#pragma unroll
  for (int quad = 0; quad < kItems / 4; ++quad) {
    const int n = first + Keys<kItems>::place(quad);
    std::uint32_t real = (1U << min(max(params.tokens - n, 0), 4)) - 1U, kept = 0;
    if (real_mask != nullptr) {
      real = bits_of(load_masks(real_mask, params.mask_stride[1], real_vectors, n, params.tokens));
    }
    if (keep_mask != nullptr) {
      kept = bits_of(load_masks(keep_mask, params.keep_stride[1], keep_vectors, n, params.tokens));
    }
    if (n + 3 >= keep_from) {
      kept |= 15U << max(keep_from - n, 0) & 15U;
    }
    all_real |= real << (4 * quad);
    all_kept |= kept << (4 * quad);
  }
  clear();
  std::uint32_t largest = 0, budget_bits = 0, rank_bits = 0;
#pragma unroll
  for (int quad = 0; quad < kItems / 4; ++quad) {
    const std::uint32_t real = all_real >> (4 * quad) & 15U, kept = all_kept >> (4 * quad) & 15U;
    if (real != 15U) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool is_real = (real >> c & 1U) != 0;
        keys.budget[4 * quad + c] = is_real ? keys.budget[4 * quad + c] : 0U;
        keys.rank[4 * quad + c] = is_real ? keys.rank[4 * quad + c] : 0U;
      }
    }
#pragma unroll
    for (int i = 4 * quad; i < 4 * quad + 4; ++i) {
      const std::uint32_t b_bits = keys.budget[i];
      const std::uint32_t r_bits = __float_as_uint(__uint_as_float(keys.rank[i]) + 0.0F);  // -0 is 0
      largest = max(largest, max(b_bits & ~kSignBit, r_bits & ~kSignBit));
      budget_bits |= b_bits;
      rank_bits |= r_bits;
      keys.budget[i] = static_cast<std::uint32_t>(max(static_cast<int>(b_bits), 0));
      const std::uint32_t ordered = r_bits ^ (static_cast<std::uint32_t>(static_cast<int>(r_bits) >> 31) | kSignBit);
      keys.rank[i] = min(ordered, kLargestRank);
    }
    if (real != 15U || kept != 0) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool is_real = (real >> c & 1U) != 0, is_kept = (kept >> c & 1U) != 0;
        keys.rank[4 * quad + c] = !is_real ? kNotReal : is_kept ? kKept : keys.rank[4 * quad + c];
      }
    }
  }
  // A budget of -0 counts as negative, which costs a pass and changes nothing.
  return {(largest >= kInfinityBits ? 1U : 0U) | ((budget_bits & ~kSignBit) != 0 ? 2U : 0U) |
              ((rank_bits & ~kSignBit) != 0 ? 4U : 0U) | ((budget_bits | rank_bits) >> 31 << 3),
          static_cast<std::uint32_t>(__popc(all_real))};
}

}  // namespace zipvl::cuda::select_tokens
