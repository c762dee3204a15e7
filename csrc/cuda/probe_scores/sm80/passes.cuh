// The two passes of the portable kernels and their launches. One block an item: it holds on to one operand while tiles
// of the other stream past.
#pragma once

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/probe_scores/passes.h"
#include "cuda/probe_scores/sm80/tiles.cuh"
#include "cuda/probe_scores/statistics.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::probe_scores::sm80 {

// First pass: each probe row's maximum and sum over a chunk of keys. Rows are held, keys stream.
template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksEach)
    probe_rows_sm80(const __grid_constant__ ProbeScoresParams params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const std::uint32_t shared = ptx::shared_address(shared_bytes);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
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

  RowStatistics stats;
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
          bool unmasked = first_key + kStreamRows - 1 <= range.x;
#pragma unroll
          for (int i = 0; i < kStreamRows / 32; ++i) {
            words[i] = 0xFFFFFFFFU;
            if (params.mask_words != nullptr) {
              words[i] = params.mask_words[b * static_cast<std::int64_t>(params.words) + first_key / 32 + i];
              unmasked = unmasked && words[i] == 0xFFFFFFFFU;
            }
          }
          if (!unmasked) {
            const int limit[2] = {limits[0], limits[8]};  // read again: two registers more would spill
            apply_mask(s, limit, first_key, words);
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

// Second pass: each key's weight summed over the probe rows that see it. Keys are held, rows stream.
template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksEach)
    probe_columns_sm80(const __grid_constant__ ProbeScoresParams params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const std::uint32_t shared = ptx::shared_address(shared_bytes);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();

  auto item = static_cast<int>(blockIdx.x);
  const int key_blocks = ceil_div(params.tokens, kBlockRows);
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
          add_column_sums<false>(sum, s, lse + row, limit + row, key, params.scale_log2);
        } else {
          add_column_sums<true>(sum, s, lse + row, limit + row, key, params.scale_log2);
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

template <typename Traits>
cudaError_t launch_pass(void (*kernel)(const ProbeScoresParams), int blocks, const ProbeScoresParams& params,
                        cudaStream_t stream) {
  return launch_dependent(kernel, static_cast<unsigned>(blocks), kThreads, Traits::kSharedBytes, stream, params);
}

template <typename ElementType, int HeadDim>
cudaError_t Passes<ElementType, HeadDim>::row_statistics(const ProbeScoresParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  const int blocks = params.batch * params.kv_heads * params.splits * (params.rows_padded / kBlockRows);
  return launch_pass<Tr>(&probe_rows_sm80<Tr>, blocks, params, stream);
}

template <typename ElementType, int HeadDim>
cudaError_t Passes<ElementType, HeadDim>::column_sums(const ProbeScoresParams& params, cudaStream_t stream) {
  using Tr = Traits<ElementType, HeadDim>;
  const int blocks = params.batch * params.kv_heads * params.row_splits * ceil_div(params.tokens, kBlockRows);
  return launch_pass<Tr>(&probe_columns_sm80<Tr>, blocks, params, stream);
}

}  // namespace zipvl::cuda::probe_scores::sm80
