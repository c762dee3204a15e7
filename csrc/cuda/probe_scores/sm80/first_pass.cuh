// First pass: each probe row's maximum and sum over a chunk of keys. Rows are held, keys stream. One block an item.
#pragma once

#include "cuda/probe_scores/probe_scores.h"
#include "cuda/probe_scores/sm80/tiles.cuh"
#include "cuda/probe_scores/tile_math.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::probe::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksEach)
    probe_rows_sm80(const __grid_constant__ ProbeScoresParams params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const std::uint32_t shared = ptx::shared_address(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();

  auto item = static_cast<int>(blockIdx.x);
  const int row_blocks = params.rows_padded / kBlockRows;
  const int block_row = item % row_blocks * kBlockRows;
  item /= row_blocks;
  const int split = item % params.splits;
  item /= params.splits;
  const int h = item % params.kv_heads, b = item / params.kv_heads;
  const std::int64_t head = static_cast<std::int64_t>(b) * params.kv_heads + h;

  const int2* ranges = reinterpret_cast<const int2*>(params.unit_range) +
                       static_cast<std::int64_t>(b) * (params.rows_padded / kUnitRows) + block_row / kUnitRows;
  const int2 range = ranges[warp * kWarpRows / kUnitRows];
  const int first_row = block_row + warp * kWarpRows + lane / 4;
  const std::int32_t* limits = params.row_limit + static_cast<std::int64_t>(b) * params.rows_padded + first_row;
  const int chunk = split * params.chunk_keys;
  const int last_key = min(max(ranges[0].y, ranges[1].y), chunk + params.chunk_keys - 1);
  const int first_tile = chunk / kStreamRows, last_tile = last_key < chunk ? first_tile : last_key / kStreamRows + 1;

  RowStats stats;
  if (first_tile < last_tile) {
    const auto* rows = static_cast<const Element*>(params.probe_rows) + head * params.rows * Traits::kHeadDim;
    const auto* keys = static_cast<const Element*>(params.k) + b * params.k_stride[0] + h * params.k_stride[1];
    std::uint32_t held[Traits::kSteps][4];
    stream_tiles<Traits>(
        shared, first_tile, last_tile, held,
        [&](std::uint32_t target) {
          load_tile<Traits>(target, rows, block_row, params.rows, Traits::kHeadDim);
          load_tile<Traits>(target + Traits::kTileBytes, rows, block_row + kStreamRows, params.rows, Traits::kHeadDim);
        },
        [&](int tile, std::uint32_t target) {
          load_tile<Traits>(target, keys, tile * kStreamRows, params.tokens, params.k_stride[2]);
        },
        [&](int tile, std::uint32_t source) {
          const int first_key = tile * kStreamRows;
          if (first_key > range.y) {
            return;
          }
          float s[kScores];
          multiply<Traits>(s, held, source, lane);
          std::uint32_t words[kStreamRows / 32];
          bool all_seen = first_key + kStreamRows - 1 <= range.x;
#pragma unroll
          for (int i = 0; i < kStreamRows / 32; ++i) {
            words[i] = 0xFFFFFFFFU;
            if (params.mask_words != nullptr) {
              words[i] = params.mask_words[b * static_cast<std::int64_t>(params.words) + first_key / 32 + i];
              all_seen = all_seen && words[i] == 0xFFFFFFFFU;
            }
          }
          if (!all_seen) {
            const int limit[2] = {limits[0], limits[8]};  // read again: two registers more would spill
            hide_keys(s, limit, first_key, words);
          }
          stats.add(s, params.scale_log2);
        });
  }
  stats.reduce(params.scale_log2);
  if (lane % 4 == 0) {
    auto* partial =
        reinterpret_cast<float2*>(params.partial) + (head * params.splits + split) * params.rows_padded + first_row;
    partial[0] = make_float2(stats.max[0], stats.sum[0]);
    partial[8] = make_float2(stats.max[1], stats.sum[1]);
  }
}

}  // namespace zipvl::cuda::probe::sm80
