// What the kernels that read the probes' rows share: where a probe is, what it may see, and the pieces of its rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/probe_scores/probe_scores.h"

namespace zipvl::cuda {

constexpr int kPieceElements = 8;  // of 16 bytes

__device__ __forceinline__ bool is_token(const ProbeScoresParams& params, int position) {
  return position >= 0 && position < params.tokens;
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
__device__ __forceinline__ int limit_of(const ProbeScoresParams& params, int position) {
  return !is_token(params, position) ? -1 : params.causal ? position : params.tokens - 1;
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

}  // namespace zipvl::cuda
