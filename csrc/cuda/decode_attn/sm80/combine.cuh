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

// Of one kind of tiles, whose places begin at `first_place`. Every thread of a warp calls.
__device__ __forceinline__ PlaceRange place_range(const RowTiles& tiles, int blocks, int least,
                                                  std::int64_t first_place, const OutputHead& head) {
  const Share share = make_share(tiles, blocks, least);
  const std::uint32_t before = row_first(tiles, head.b);
  const auto of_row = static_cast<std::uint32_t>(tiles.tiles(head.b));
  if (of_row == 0) {
    return {0, 0};
  }
  const std::uint32_t first = before + static_cast<std::uint32_t>(head.in_row) * of_row;
  const auto low = static_cast<int>(share.owner(first)), high = static_cast<int>(share.owner(first + of_row - 1));
  return {first_place + low + static_cast<std::int64_t>(head.b) * tiles.items_per_row + head.in_row, high - low + 1};
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

// weights, places: [Kinds * decode_shape::kMostBlocks] in shared memory.
template <typename Element, int D, int Kinds>
__device__ __forceinline__ void combine(const PlaceRange (&ranges)[Kinds], const OutputHead& head,
                                        const DecodePartials& partials, Element* out, float* lse, float* weights,
                                        int* places) {
  constexpr int kLanes = D / 4;  // threads of a row, 4 channels each
  constexpr int kGroups = kCombineThreads / kLanes;
  __shared__ float4 sums[kCombineThreads];
  const int thread = static_cast<int>(threadIdx.x);
  float most = kNone;
  int count = 0;
#pragma unroll
  for (int kind = 0; kind < Kinds; ++kind) {
    for (int i = thread; i < ranges[kind].count; i += kCombineThreads) {
      const std::int64_t place = (ranges[kind].first + i) * kDecodeHeads + head.in_chunk;
      places[count + i] = static_cast<int>(place);
      weights[count + i] = partials.lse[place];
    }
    count += ranges[kind].count;
  }
  __syncthreads();
  // Every warp finds the maximum and the sum for itself: cheaper than another barrier.
  for (int i = thread % 32; i < count; i += 32) {
    most = fmaxf(most, weights[i]);
  }
  most = warp_max(most);
  const float shift = most == kNone ? 0.0F : most;
  float total = 0.0F;
  for (int i = thread % 32; i < count; i += 32) {
    total += ptx::exp2(weights[i] - shift);
  }
  total = warp_sum(total);
  const int group = thread / kLanes, lane = thread % kLanes;
  float4 sum{};
  if (group < kGroups) {
#pragma unroll 8
    for (int i = group; i < count; i += kGroups) {
      const float weight = ptx::exp2(weights[i] - shift);
      const float4 part =
          *reinterpret_cast<const float4*>(partials.out + static_cast<std::int64_t>(places[i]) * D + 4 * lane);
      sum.x += weight * part.x;
      sum.y += weight * part.y;
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
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
