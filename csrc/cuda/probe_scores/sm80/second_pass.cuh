// Second pass: each key's weight summed over the probe rows that see it. Keys are held, rows stream. One block an item.
#pragma once

#include "cuda/probe_scores/probe_scores.h"
#include "cuda/probe_scores/sm80/tiles.cuh"
#include "cuda/probe_scores/tile_math.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::probe::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksEach)
    probe_columns_sm80(const __grid_constant__ ProbeScoresParams params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const std::uint32_t shared = ptx::shared_address(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();

  auto item = static_cast<int>(blockIdx.x);
  const int key_blocks = (params.tokens + kBlockRows - 1) / kBlockRows;
  const int row_split = item % params.row_splits;
  item /= params.row_splits;
  const int block_key = item % key_blocks * kBlockRows;
  item /= key_blocks;
  const int h = item % params.kv_heads, b = item / params.kv_heads;
  const std::int64_t head = static_cast<std::int64_t>(b) * params.kv_heads + h;

  const int tiles = params.rows_padded / kStreamRows;
  const int first_tile = row_split * tiles / params.row_splits, last_tile = (row_split + 1) * tiles / params.row_splits;
  const int2* ranges = reinterpret_cast<const int2*>(params.unit_range) + static_cast<std::int64_t>(b) * tiles;
  const auto* rows = static_cast<const Element*>(params.probe_rows) + head * params.rows * Traits::kHeadDim;
  const auto* keys = static_cast<const Element*>(params.k) + b * params.k_stride[0] + h * params.k_stride[1];
  const float* lse = params.row_lse + head * params.rows_padded;
  const std::int32_t* limit = params.row_limit + static_cast<std::int64_t>(b) * params.rows_padded;
  const int first_key = block_key + warp * kWarpRows;

  float sum[2] = {0.0F, 0.0F};
  std::uint32_t held[Traits::kSteps][4];
  stream_tiles<Traits>(
      shared, first_tile, last_tile, held,
      [&](std::uint32_t target) {
        load_tile<Traits>(target, keys, block_key, params.tokens, params.k_stride[2]);
        load_tile<Traits>(target + Traits::kTileBytes, keys, block_key + kStreamRows, params.tokens,
                          params.k_stride[2]);
      },
      [&](int tile, std::uint32_t target) {
        if (ranges[tile].y >= block_key) {
          load_tile<Traits>(target, rows, tile * kStreamRows, params.rows, Traits::kHeadDim);
        }
      },
      [&](int tile, std::uint32_t source) {
        const int2 range = ranges[tile];
        if (range.y < first_key) {
          return;
        }
        float s[kScores];
        multiply<Traits>(s, held, source, lane);
        const int row = tile * kStreamRows, key = first_key + lane / 4;
        if (first_key + kWarpRows - 1 <= range.x) {
          add_weights<false>(sum, s, lse + row, limit + row, key, params.scale_log2);
        } else {
          add_weights<true>(sum, s, lse + row, limit + row, key, params.scale_log2);
        }
      });
  float* sums = params.sums + (head * params.row_splits + row_split) * params.tokens;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = quad_sum(sum[i]);
    const int key = first_key + lane / 4 + 8 * i;
    if (lane % 4 == 0 && key < params.tokens) {
      sums[key] = total;
    }
  }
}

}  // namespace zipvl::cuda::probe::sm80
