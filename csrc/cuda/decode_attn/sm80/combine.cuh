// The second kernel of split-KV attention: it combines the partial results of an item into its output, in a fixed
// order, one block of threads a query head.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/common/warp.cuh"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/schedule.cuh"
#include "cuda/decode_attn/sm80/quantized_kernel.cuh"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode_attn::sm80 {

// Threads of a block. Few heads leave multiprocessors free, and every partial result is loaded at once; many are all
// resident beside the kernel before only if they are small.
constexpr int kCombineThreads = 256, kCombineThreadsManyHeads = 128;
constexpr int kManyHeads = 256;
constexpr int kCombineRegisters = 64;

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
struct PartialRange {
  std::int64_t first;
  int count;
};

// Every lane of a warp calls. By the arithmetic of for_each_split().
template <int MinTiles, typename Rows>
__device__ __forceinline__ PartialRange partial_range(const Rows& rows, int blocks, const OutputHead& head) {
  const auto counts = rows.count(head.b);
  const auto of_row = static_cast<std::uint32_t>(rows.tiles(counts));
  const Load load = measure_load(rows, counts);
  const int per_item = blocks_per_item(rows, blocks);
  const int item = head.b * rows.items_per_row + head.in_row;
  if (of_row == 0) {
    return {0, 0};
  }
  if (is_fixed_split(load, blocks, per_item, MinTiles)) {
    const EvenSplits splits(of_row, static_cast<std::uint32_t>(per_item), MinTiles);
    return {static_cast<std::int64_t>(item) * per_item, static_cast<int>(splits.count)};
  }
  const EvenSplits splits(load.total, static_cast<std::uint32_t>(blocks), MinTiles);
  const std::uint32_t first = row_first(rows, head.b) + static_cast<std::uint32_t>(head.in_row) * of_row;
  const auto low = static_cast<int>(splits.owner(first)), high = static_cast<int>(splits.owner(first + of_row - 1));
  return {std::int64_t{low} + item, high - low + 1};
}

// Partial results weighted by their log-sum-exps, in a thread's four channels.
struct WeightedSum {
  float running_max = kMinusInfinity, running_sum = 0.0F;
  float4 out{};

  template <int Rows>
  __device__ __forceinline__ void add(const float (&lse)[Rows], const float4 (&rows)[Rows]) {
    float new_max = running_max;
#pragma unroll
    for (int k = 0; k < Rows; ++k) {
      new_max = fmaxf(new_max, lse[k]);
    }
    const float shift = finite_shift(new_max), factor = ptx::exp2(running_max - shift);
    running_max = new_max;
    running_sum *= factor;
    out = scaled(out, factor);
#pragma unroll
    for (int k = 0; k < Rows; ++k) {
      const float weight = ptx::exp2(lse[k] - shift);
      running_sum += weight;
      add_weighted(out, weight, rows[k]);
    }
  }
};

template <typename ElementType, int D, int Threads>
__device__ __forceinline__ void combine(const PartialRange& range, const OutputHead& head,
                                        const DecodePartials& partials, ElementType* out, float* lse) {
  constexpr int kLanes = D / 4;  // threads of a row, 4 channels each
  constexpr int kGroups = Threads / kLanes;
  constexpr int kAhead = 9;  // rows of a group loaded at once: 132 blocks for 4 heads leave 33, of 8 or 4 groups
  __shared__ float4 outs[kGroups][kLanes];
  __shared__ float maxima[kGroups], sums[kGroups];
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
        lse_of[k] = valid ? partials.lse[row] : kMinusInfinity;
        rows[k] = valid ? reinterpret_cast<const float4*>(partials.out)[row * kLanes + lane] : float4{};
      }
      mine.add(lse_of, rows);
    }
    outs[group][lane] = mine.out;
    if (lane == 0) {
      maxima[group] = mine.running_max;
      sums[group] = mine.running_sum;
    }
  }
  __syncthreads();
  if (group == 0) {
    float max = kMinusInfinity;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      max = fmaxf(max, maxima[g]);
    }
    const float shift = finite_shift(max);
    float sum = 0.0F;
    float4 all{};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float weight = ptx::exp2(maxima[g] - shift);
      const float4 out_of_group = outs[g][lane];
      sum += weight * sums[g];
      add_weighted(all, weight, out_of_group);
    }
    const float factor = range.count > 0 ? 1.0F / sum : 0.0F;
    store_element(out + 4 * lane, all.x * factor);
    store_element(out + 4 * lane + 1, all.y * factor);
    store_element(out + 4 * lane + 2, all.z * factor);
    store_element(out + 4 * lane + 3, all.w * factor);
    if (lane == 0) {
      *lse = (max + log2f(sum)) * std::numbers::ln2_v<float>;
    }
  }
}

template <typename ElementType, int D, int MinTiles, int Threads>
__global__ void __launch_bounds__(Threads, 65536 / (Threads * kCombineRegisters))
    combine_kernel(const __grid_constant__ DecodeAttnParams params) {
  ptx::launch_dependent_grids();
  const OutputHead head = output_head(params);
  const PartialRange range = partial_range<MinTiles>(row_tiles(params), params.blocks, head);
  ptx::wait_on_dependent_grids();
  const std::int64_t at = blockIdx.x;
  combine<ElementType, D, Threads>(range, head, params.partials, static_cast<ElementType*>(params.out) + at * D,
                                   params.lse + at);
}

template <typename ElementType, int D, int Threads>
__global__ void __launch_bounds__(Threads, 65536 / (Threads * kCombineRegisters))
    combine_quantized_kernel(const __grid_constant__ DecodeAttnQuantizedParams params) {
  const DecodeAttnParams& attn = params.attn;
  ptx::launch_dependent_grids();
  const OutputHead head = output_head(attn);
  const PartialRange range = partial_range<kMinQuantizedWarps>(QuantizedRowTiles(params), attn.blocks, head);
  ptx::wait_on_dependent_grids();
  const std::int64_t at = blockIdx.x;
  combine<ElementType, D, Threads>(range, head, attn.partials, static_cast<ElementType*>(attn.out) + at * D,
                                   attn.lse + at);
}

}  // namespace zipvl::cuda::decode_attn::sm80
