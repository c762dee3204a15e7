// From the second pass's sums to a token's scores: the kernel that writes them, and the selection that makes them as it
// reads, give the same bits.
#pragma once

#include <cstdint>

namespace zipvl::cuda {

constexpr int kPartsAtOnce = 16;  // loads of a token's parts under way; 28/4 heads have 12 in short prompts

__device__ __forceinline__ void add_part(float& sum, float part) { sum += part; }
__device__ __forceinline__ void add_part(float4& sum, float4 part) {
  sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
}

// The parts of a token (float) or of four (float4), `stride` of that type apart, added up in their order.
template <typename Sum>
__device__ __forceinline__ Sum sum_of_parts(const Sum* first, int parts, std::int64_t stride) {
  Sum total{};
  for (int begin = 0; begin < parts; begin += kPartsAtOnce) {
    Sum part[kPartsAtOnce];
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      part[i] = begin + i < parts ? *first : Sum{};
      first += stride;
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      add_part(total, part[i]);
    }
  }
  return total;
}

struct TokenScores {
  float accumulated, normalized;
};

// sum: a token's weights over all rows. viewers: the probes that see it; 0 where it is not real.
__device__ __forceinline__ TokenScores scores_of(float sum, int viewers, int query_heads) {
  const float total = viewers > 0 ? sum / static_cast<float>(query_heads) : 0.0F;
  return {total, viewers > 0 ? total / static_cast<float>(viewers) : 0.0F};
}

}  // namespace zipvl::cuda
