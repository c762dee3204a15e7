// Second pass: each key's weight summed over the probe rows that see it. Keys are held, rows stream.
#pragma once

#include "cuda/probe_scores/probe_scores.h"
#include "cuda/probe_scores/sm90/pipeline.cuh"
#include "cuda/probe_scores/tile_math.cuh"
#include "cuda/ptx/tma.cuh"

namespace zipvl::cuda::probe::sm90 {

// The keys of a block against one part of the rows of their head. Early keys, which more probes see, come first: the
// items of a wave are about as long as each other.
template <typename Traits>
struct SecondItem {
  int b, h, first_key, row_split, first_tile, tile_step, last_tile;  // tiles of kStreamRows rows

  __device__ __forceinline__ SecondItem(const ProbeScoresParams& params, int item) {
    row_split = item % params.row_splits;
    item /= params.row_splits;
    h = item % params.kv_heads;
    item /= params.kv_heads;
    b = item % params.batch;
    first_key = item / params.batch * Traits::kBlockRows;
    const int tiles = params.rows_padded / Traits::kStreamRows;
    first_tile = row_split;
    tile_step = params.row_splits;
    last_tile = tiles;
  }
};

template <typename Traits>
__host__ __device__ __forceinline__ int second_items(const ProbeScoresParams& params) {
  return params.batch * params.kv_heads * params.row_splits *
         ((params.tokens + Traits::kBlockRows - 1) / Traits::kBlockRows);
}

// Least and greatest limit of the rows of a tile.
template <typename Traits>
__device__ __forceinline__ int2 tile_range(const ProbeScoresParams& params, int b, int tile) {
  constexpr int kUnits = Traits::kStreamRows / kUnitRows;
  const int2* range = reinterpret_cast<const int2*>(params.unit_range) +
                      static_cast<std::int64_t>(b) * (params.rows_padded / kUnitRows) + tile * kUnits;
  int2 all = range[0];
  if constexpr (kUnits == 2) {
    const int2 other = range[1];
    all = make_int2(min(all.x, other.x), max(all.y, other.y));
  }
  return all;
}

template <typename Traits>
__device__ __forceinline__ void stream_rows(const ProbeScoresParams& params, const CUtensorMap* rows,
                                            SharedStorage<Traits>& shared) {
  constexpr std::uint32_t kBytes = Traits::kStreamRows * 4;  // of lse, and of limit
  PipelineState<Traits::kStages> place;
  for (ItemWalk walk(second_items<Traits>(params)); walk.valid(); walk.next()) {
    const SecondItem<Traits> item(params, walk.item());
    const std::int64_t head = static_cast<std::int64_t>(item.b) * params.kv_heads + item.h;
    for (int tile = item.first_tile; tile < item.last_tile; tile += item.tile_step) {
      if (tile_range<Traits>(params, item.b, tile).y < item.first_key) {
        continue;
      }
      const int row = tile * Traits::kStreamRows;
      load_stream(shared, place, rows, row, item.h, item.b, 2 * kBytes);
      ptx::bulk_load(shared.lse[place.index], params.row_lse + head * params.rows_padded + row, kBytes,
                     &shared.full[place.index]);
      ptx::bulk_load(shared.limit[place.index],
                     params.row_limit + item.b * static_cast<std::int64_t>(params.rows_padded) + row, kBytes,
                     &shared.full[place.index]);
      place.advance();
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void sum_weights(const ProbeScoresParams& params, const CUtensorMap* keys,
                                            SharedStorage<Traits>& shared, int warpgroup) {
  Consumer<Traits> consumer{shared, warpgroup};
  const int key_of_thread = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + threadIdx.x % kWarpThreads / 4;
  for (ItemWalk walk(second_items<Traits>(params)); walk.valid(); walk.next()) {
    const SecondItem<Traits> item(params, walk.item());
    const int first_key = item.first_key + warpgroup * kUnitRows;
    const int last_key = first_key + kUnitRows - 1;
    consumer.request(keys, first_key, item.h, item.b);
    consumer.hold();
    float sum[2] = {0.0F, 0.0F};
    for (int tile = item.first_tile; tile < item.last_tile; tile += item.tile_step) {
      const int2 range = tile_range<Traits>(params, item.b, tile);
      if (range.y < item.first_key) {
        continue;
      }
      consumer.await_tile();
      if (range.y >= first_key) {
        float s[Consumer<Traits>::kScores];
        consumer.multiply(s);
        const float* lse = shared.lse[consumer.place.index];
        const std::int32_t* limit = shared.limit[consumer.place.index];
        if (last_key <= range.x) {
          add_weights<false>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
        } else {
          add_weights<true>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
        }
      }
      consumer.release();
    }
    const std::int64_t head = static_cast<std::int64_t>(item.b) * params.kv_heads + item.h;
    float* sums = params.sums + (head * params.row_splits + item.row_split) * params.tokens;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = quad_sum(sum[i]);
      const int key = first_key + key_of_thread + 8 * i;
      if (threadIdx.x % 4 == 0 && key < params.tokens) {
        sums[key] = total;
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    probe_columns_sm90(const __grid_constant__ ProbeScoresParams params, const __grid_constant__ CUtensorMap keys,
                       const __grid_constant__ CUtensorMap rows) {
  auto& shared = aligned_shared<SharedStorage<Traits>>();
  begin(shared, &keys, &rows);
  // Through lane 0, so that the compiler knows it to be the same in the whole warp.
  const int warpgroup = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == Traits::kConsumers) {
    if (threadIdx.x % kWarpThreads == 0) {
      stream_rows(params, &rows, shared);
    }
  } else {
    sum_weights(params, &keys, shared, warpgroup);
  }
}

}  // namespace zipvl::cuda::probe::sm90
