// Partial results of an item become its output, in a fixed order: one block of threads a query head.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/schedule.cuh"
#include "cuda/decode_attn/sm80/quantized_kernel.cuh"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/sync.cuh"

namespace zipvl::cuda::decode {

// Threads of a block. Few heads leave multiprocessors free, and every partial result is loaded at once; many are all
// resident beside the kernel before only if they are small.
constexpr int kCombineThreads = 256, kCombineThreadsOfMany = 128;
constexpr int kManyHeads = 256;
constexpr int kCombineRegisters = 64;

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

// Every lane of a warp calls. By the arithmetic of walk().
template <int MinTiles, typename Rows>
__device__ __forceinline__ PlaceRange place_range(const Rows& rows, int blocks, const OutputHead& head) {
  const auto counts = rows.count(head.b);
  const auto of_row = static_cast<std::uint32_t>(rows.tiles(counts));
  const Load load = measure(rows, counts);
  const int of_item = blocks_of_item(rows, blocks);
  const int item = head.b * rows.items_per_row + head.in_row;
  if (of_row == 0) {
    return {0, 0};
  }
  if (stay_apart(load, blocks, of_item, MinTiles)) {
    const Shares shares(of_row, static_cast<std::uint32_t>(of_item), MinTiles);
    return {static_cast<std::int64_t>(item) * of_item, static_cast<int>(shares.count)};
  }
  const Shares shares(load.total, static_cast<std::uint32_t>(blocks), MinTiles);
  const std::uint32_t first = row_first(rows, head.b) + static_cast<std::uint32_t>(head.in_row) * of_row;
  const auto low = static_cast<int>(shares.owner(first)), high = static_cast<int>(shares.owner(first + of_row - 1));
  return {std::int64_t{low} + item, high - low + 1};
}

// Rows with their log-sum-exps, summed by a thread's four channels.
struct WeightedSum {
  float most = kNone, total = 0.0F;
  float4 sum{};

  template <int Rows>
  __device__ __forceinline__ void add(const float (&lse)[Rows], const float4 (&rows)[Rows]) {
    float now = most;
#pragma unroll
    for (int k = 0; k < Rows; ++k) {
      now = fmaxf(now, lse[k]);
    }
    const float shift = now == kNone ? 0.0F : now, factor = ptx::exp2(most - shift);
    most = now;
    total *= factor;
    sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
#pragma unroll
    for (int k = 0; k < Rows; ++k) {
      const float weight = ptx::exp2(lse[k] - shift);
      total += weight;
      sum.x += weight * rows[k].x;
      sum.y += weight * rows[k].y;
      sum.z += weight * rows[k].z;
      sum.w += weight * rows[k].w;
    }
  }
};

template <typename Element, int D, int Threads>
__device__ __forceinline__ void combine(const PlaceRange& range, const OutputHead& head, const DecodePartials& partials,
                                        Element* out, float* lse) {
  constexpr int kLanes = D / 4;  // threads of a row, 4 channels each
  constexpr int kGroups = Threads / kLanes;
  constexpr int kAhead = 9;  // rows of a group loaded at once: 132 blocks for 4 heads leave 33, of 8 or 4 groups
  __shared__ float4 sums[kGroups][kLanes];
  __shared__ float maxima[kGroups], totals[kGroups];
  const int thread = static_cast<int>(threadIdx.x), group = thread / kLanes, lane = thread % kLanes;
  WeightedSum mine;
  if (group < kGroups) {
#pragma unroll 1
    for (int first = group; first < range.count; first += kAhead * kGroups) {
      float lse_of[kAhead];
      float4 rows[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const bool valid = first + k * kGroups < range.count;
        const std::int64_t row = (range.first + first + k * kGroups) * kDecodeHeads + head.in_chunk;
        lse_of[k] = valid ? partials.lse[row] : kNone;
        rows[k] = valid ? reinterpret_cast<const float4*>(partials.out)[row * kLanes + lane] : float4{};
      }
      mine.add(lse_of, rows);
    }
    sums[group][lane] = mine.sum;
    if (lane == 0) {
      maxima[group] = mine.most;
      totals[group] = mine.total;
    }
  }
  __syncthreads();
  if (group == 0) {
    float most = kNone;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      most = fmaxf(most, maxima[g]);
    }
    const float shift = most == kNone ? 0.0F : most;
    float total = 0.0F;
    float4 sum{};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float weight = ptx::exp2(maxima[g] - shift);
      const float4 other = sums[g][lane];
      total += weight * totals[g];
      sum.x += weight * other.x;
      sum.y += weight * other.y;
      sum.z += weight * other.z;
      sum.w += weight * other.w;
    }
    const float factor = range.count > 0 ? 1.0F / total : 0.0F;
    store(out + 4 * lane, sum.x * factor);
    store(out + 4 * lane + 1, sum.y * factor);
    store(out + 4 * lane + 2, sum.z * factor);
    store(out + 4 * lane + 3, sum.w * factor);
    if (lane == 0) {
      *lse = (most + log2f(total)) * 0.6931471805599453F;
    }
  }
}

template <typename Element, int D, int MinTiles, int Threads>
__global__ void __launch_bounds__(Threads, 65536 / (Threads * kCombineRegisters))
    combine_kernel(const __grid_constant__ DecodeAttnParams params) {
  ptx::launch_dependent_grids();
  const OutputHead head = output_head(params);
  const PlaceRange range = place_range<MinTiles>(row_tiles(params), params.blocks, head);
  ptx::wait_on_dependent_grids();
  const std::int64_t at = blockIdx.x;
  combine<Element, D, Threads>(range, head, params.partials, static_cast<Element*>(params.out) + at * D,
                               params.lse + at);
}

template <typename Element, int D, int Threads>
__global__ void __launch_bounds__(Threads, 65536 / (Threads * kCombineRegisters))
    combine_quantized_kernel(const __grid_constant__ DecodeAttnQuantizedParams params) {
  const DecodeAttnParams& attn = params.attn;
  ptx::launch_dependent_grids();
  const OutputHead head = output_head(attn);
  const PlaceRange range = place_range<decode_shape::kMinQuantizedWarps>(LineOfTiles(params), attn.blocks, head);
  ptx::wait_on_dependent_grids();
  const std::int64_t at = blockIdx.x;
  combine<Element, D, Threads>(range, head, attn.partials, static_cast<Element*>(attn.out) + at * D, attn.lse + at);
}

}  // namespace zipvl::cuda::decode
