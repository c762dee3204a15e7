// Several kernels share this: they find a probe and what it may see, load the pieces of its rows, and make a token's
// scores of its column sums. The selection that makes the scores as it reads gives the same bits as the kernel that
// writes them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/smem_layout.cuh"
#include "cuda/probe_scores/params.h"
#include "cuda/probe_scores/plan.h"

namespace zipvl::cuda::probe_scores {

constexpr int kUnitRows = static_cast<int>(plan::kProbeUnitRows);  // rows that share one range of limits

__device__ __forceinline__ bool is_token(const ProbeScoresParams& params, int position) {
  return position >= params.first_query && position < params.tokens;
}

__device__ __forceinline__ int probe_position(const ProbeScoresParams& params, std::int64_t b, int probe) {
  return params.probe_index[b * params.probe_stride[0] + probe * params.probe_stride[1]];
}

// The same where the probes may have been drawn right before the kernel started, or are drawn here.
__device__ __forceinline__ int new_probe_position(const ProbeScoresParams& params, std::int64_t b, int probe) {
  return params.probe_index == nullptr
             ? static_cast<int>(params.draw.rank(probe))
             : __ldcg(params.probe_index + b * params.probe_stride[0] + probe * params.probe_stride[1]);
}

// The last key a probe may see, or -1.
__device__ __forceinline__ int limit_of(const ProbeScoresParams& params, std::int64_t b, int position) {
  if (!is_token(params, position)) {
    return -1;
  }
  if (params.last_key != nullptr) {
    const std::int32_t last =
        params.last_key[b * params.last_key_stride[0] + (position - params.first_query) * params.last_key_stride[1]];
    return min(max(last, -1), params.tokens - 1);
  }
  return params.causal ? position : params.tokens - 1;
}

// Whether every piece of q is aligned to its 16 bytes.
__device__ __forceinline__ bool has_aligned_pieces(const ProbeScoresParams& params) {
  return (reinterpret_cast<std::uintptr_t>(params.q) % 16 | params.q_stride[0] % kPieceElements |
          params.q_stride[1] % kPieceElements | params.q_stride[2] % kPieceElements) == 0;
}

// A piece of q, its sign flipped where the scale is negative.
__device__ __forceinline__ uint4 load_piece(const ProbeScoresParams& params, const std::uint16_t* source,
                                            bool aligned) {
  uint4 value;
  if (aligned) {
    value = *reinterpret_cast<const uint4*>(source);
  } else {
    value.x = source[0] | static_cast<std::uint32_t>(source[1]) << 16;
    value.y = source[2] | static_cast<std::uint32_t>(source[3]) << 16;
    value.z = source[4] | static_cast<std::uint32_t>(source[5]) << 16;
    value.w = source[6] | static_cast<std::uint32_t>(source[7]) << 16;
  }
  const std::uint32_t sign = params.negate ? 0x80008000U : 0U;
  return make_uint4(value.x ^ sign, value.y ^ sign, value.z ^ sign, value.w ^ sign);
}

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

}  // namespace zipvl::cuda::probe_scores
