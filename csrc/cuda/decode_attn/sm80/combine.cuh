// Partial results of an item become its output, in a fixed order: one block of threads a query head.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/schedule.cuh"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/sync.cuh"

namespace zipvl::cuda::decode {

constexpr int kCombineThreads = 256;

__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// A query head of the output.
struct OutputHead {
  int b, in_row, in_chunk;  // batch row, item of it, head of the item
};

__device__ __forceinline__ OutputHead output_head(const DecodeAttnParams& params) {
  const int heads = static_cast<int>(params.query_heads), group = heads / static_cast<int>(params.kv_heads);
  const int head = static_cast<int>(blockIdx.x) % heads;
  return {static_cast<int>(blockIdx.x) / heads, head / group * params.head_chunks + head % group / kDecodeHeads,
          head % group % kDecodeHeads};
}

// Partial results [first, first + count) of the head.
struct PlaceRange {
  std::int64_t first;
  int count;
};

// Every thread of a warp calls.
template <typename Rows>
__device__ __forceinline__ PlaceRange place_range(const Rows& tiles, int blocks, int least, const OutputHead& head) {
  const Share share = make_share(tiles, blocks, least);
  const std::uint32_t before = row_first(tiles, head.b);
  const auto of_row = static_cast<std::uint32_t>(tiles.tiles(head.b));
  if (of_row == 0) {
    return {0, 0};
  }
  const std::uint32_t first = before + static_cast<std::uint32_t>(head.in_row) * of_row;
  const auto low = static_cast<int>(share.owner(first)), high = static_cast<int>(share.owner(first + of_row - 1));
  return {low + static_cast<std::int64_t>(head.b) * tiles.items_per_row + head.in_row, high - low + 1};
}

__device__ __forceinline__ float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, offset));
  }
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFU, x, offset);
  }
  return x;
}

template <typename Element, int D>
__device__ __forceinline__ void combine(const PlaceRange& range, const OutputHead& head, const DecodePartials& partials,
                                        Element* out, float* lse) {
  constexpr int kLanes = D / 4;  // threads of a row, 4 channels each
  constexpr int kGroups = kCombineThreads / kLanes;
  constexpr int kAhead = 8;  // rows of a group that are loaded before their weights are known
  __shared__ float4 sums[kCombineThreads];
  __shared__ float weights[decode_shape::kMostBlocks];
  const int thread = static_cast<int>(threadIdx.x), group = thread / kLanes, lane = thread % kLanes;
  const auto row_of = [&](int i) { return (range.first + i) * kDecodeHeads + head.in_chunk; };
  const auto part = [&](int i) {
    const bool valid = group < kGroups && i < range.count;
    return valid ? *reinterpret_cast<const float4*>(partials.out + row_of(i) * D + 4 * lane) : float4{};
  };
  for (int i = thread; i < range.count; i += kCombineThreads) {
    weights[i] = partials.lse[row_of(i)];
  }
  float4 ahead[kAhead];
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    ahead[k] = part(group + k * kGroups);
  }
  __syncthreads();
  // Every warp finds the maximum and the sum for itself: cheaper than another barrier.
  float most = kNone;
  for (int i = thread % 32; i < range.count; i += 32) {
    most = fmaxf(most, weights[i]);
  }
  most = warp_max(most);
  const float shift = most == kNone ? 0.0F : most;
  float total = 0.0F;
  for (int i = thread % 32; i < range.count; i += 32) {
    total += ptx::exp2(weights[i] - shift);
  }
  total = warp_sum(total);
  float4 sum{};
  const auto add = [&](int i, const float4& values) {
    if (i < range.count) {
      const float weight = ptx::exp2(weights[i] - shift);
      sum.x += weight * values.x;
      sum.y += weight * values.y;
      sum.z += weight * values.z;
      sum.w += weight * values.w;
    }
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
    add(group + k * kGroups, ahead[k]);
  }
#pragma unroll 8
  for (int i = group + kAhead * kGroups; i < range.count; i += kGroups) {
    add(i, part(i));
  }
  sums[thread] = sum;
  __syncthreads();
  if (group == 0) {
#pragma unroll
    for (int g = 1; g < kGroups; ++g) {
      const float4 other = sums[g * kLanes + lane];
      sum.x += other.x;
      sum.y += other.y;
      sum.z += other.z;
      sum.w += other.w;
    }
    const float factor = total > 0.0F ? 1.0F / total : 0.0F;
    store(out + 4 * lane, sum.x * factor);
    store(out + 4 * lane + 1, sum.y * factor);
    store(out + 4 * lane + 2, sum.z * factor);
    store(out + 4 * lane + 3, sum.w * factor);
    if (lane == 0) {
      *lse = (most + log2f(total)) * 0.6931471805599453F;
    }
  }
}

}  // namespace zipvl::cuda::decode
