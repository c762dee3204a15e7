// The two passes of long inputs: persistent blocks hold on to 256 rows of one operand while one warp's copies stream
// tiles of the other past them.
#pragma once

#include "common/math.h"
#include "cuda/probe_scores/params.h"
#include "cuda/probe_scores/sm90/pipeline.cuh"
#include "cuda/probe_scores/statistics.cuh"

namespace zipvl::cuda::probe_scores::sm90 {

// First pass: each probe row's maximum and sum over a chunk of keys. Rows are held, keys stream.

// Rows of one head against one chunk of keys; the blocks of rows of a chunk are neighbours and share its keys in L2. A
// block takes every so many'th unit of 64 rows: early probes, which see few keys, and late ones, so that blocks are
// alike.
template <typename Traits>
struct RowsItem {
  int b, h, first_unit, unit_step, split, first_tile, last_tile;  // tiles of kStreamRows keys

  __device__ __forceinline__ RowsItem(const ProbeScoresParams& params, int item) {
    unit_step = ceil_div(params.rows, Traits::kBlockRows);
    first_unit = item % unit_step;
    item /= unit_step;
    split = item % params.splits;
    item /= params.splits;
    h = item % params.kv_heads;
    b = item / params.kv_heads;
    const int first_key = split * params.chunk_keys;
    first_tile = first_key / Traits::kStreamRows;
    int limit = -1;
#pragma unroll
    for (int i = 0; i < Traits::kConsumers; ++i) {
      limit = max(limit, range(params, i).y);
    }
    const int last_key = min(limit, first_key + params.chunk_keys - 1);
    last_tile = last_key < first_key ? first_tile : last_key / Traits::kStreamRows + 1;
  }

  __device__ __forceinline__ int unit(int warpgroup) const { return first_unit + warpgroup * unit_step; }

  // Minimum and maximum limit of a warpgroup's rows.
  __device__ __forceinline__ int2 range(const ProbeScoresParams& params, int warpgroup) const {
    const int units = params.rows_padded / kUnitRows;
    return unit(warpgroup) < units ? reinterpret_cast<const int2*>(
                                         params.unit_range)[static_cast<std::int64_t>(b) * units + unit(warpgroup)]
                                   : make_int2(-1, -1);
  }
};

template <typename Traits>
__host__ __device__ __forceinline__ int row_items(const ProbeScoresParams& params) {
  return params.batch * params.kv_heads * params.splits * ceil_div(params.rows, Traits::kBlockRows);
}

template <typename Traits>
__device__ __forceinline__ void stream_keys(const ProbeScoresParams& params, const CUtensorMap* keys,
                                            SharedStorage<Traits>& shared) {
  PipelineState<Traits::kStages> place;
  for (TileScheduler scheduler(row_items<Traits>(params)); scheduler.valid(); scheduler.next()) {
    const RowsItem<Traits> item(params, scheduler.item());
    for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
      load_stream(shared, place, keys, tile * Traits::kStreamRows, item.h, item.b);
      place.advance();
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void reduce_rows(const ProbeScoresParams& params, const CUtensorMap* rows,
                                            SharedStorage<Traits>& shared, int warpgroup) {
  using Words = std::uint32_t[Traits::kStreamRows / 32];
  Consumer<Traits> consumer{shared, warpgroup};
  const int row_of_thread = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + threadIdx.x % kWarpThreads / 4;
  for (TileScheduler scheduler(row_items<Traits>(params)); scheduler.valid(); scheduler.next()) {
    const RowsItem<Traits> item(params, scheduler.item());
    const int first_row = item.unit(warpgroup) * kUnitRows;
    if (item.first_tile < item.last_tile) {
      consumer.load_held(rows, first_row, item.h, item.b);
    }
    const int2 range = item.range(params, warpgroup);
    int limit[2] = {-1, -1};
    if (first_row < params.rows_padded) {
      for (int i = 0; i < 2; ++i) {
        limit[i] =
            params
                .row_limit[item.b * static_cast<std::int64_t>(params.rows_padded) + first_row + row_of_thread + 8 * i];
      }
    }
    if (item.first_tile < item.last_tile) {
      consumer.wait_held();
    }
    RowStatistics stats;
    for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
      const int first_key = tile * Traits::kStreamRows;
      consumer.wait_tile();
      if (first_key > range.y) {
        consumer.release();
        continue;
      }
      float s[Consumer<Traits>::kScores];
      consumer.multiply_tile(s);
      consumer.release();
      Words words;
      bool unmasked = first_key + Traits::kStreamRows - 1 <= range.x;
#pragma unroll
      for (int i = 0; i < Traits::kStreamRows / 32; ++i) {
        words[i] = 0xFFFFFFFFU;
        if (params.mask_words != nullptr) {
          words[i] = params.mask_words[item.b * static_cast<std::int64_t>(params.words) + first_key / 32 + i];
          unmasked = unmasked && words[i] == 0xFFFFFFFFU;
        }
      }
      if (!unmasked) {
        apply_mask(s, limit, first_key, words);
      }
      stats.add(s, params.scale_log2);
    }
    if (first_row < params.rows_padded) {
      stats.reduce(params.scale_log2);
      if (threadIdx.x % 4 == 0) {
        const std::int64_t head = static_cast<std::int64_t>(item.b) * params.kv_heads + item.h;
        auto* partial = reinterpret_cast<float2*>(params.partial) +
                        (head * params.splits + item.split) * params.rows_padded + first_row + row_of_thread;
        partial[0] = make_float2(stats.max[0], stats.sum[0]);
        partial[8] = make_float2(stats.max[1], stats.sum[1]);
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    probe_rows_sm90(const __grid_constant__ ProbeScoresParams params, const __grid_constant__ CUtensorMap rows,
                    const __grid_constant__ CUtensorMap keys) {
  auto& shared = aligned_shared<SharedStorage<Traits>>();
  begin(shared, &rows, &keys);
  // Through lane 0, so that the compiler knows it to be the same in the whole warp.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == Traits::kConsumers) {
    if (threadIdx.x % kWarpThreads == 0) {
      stream_keys(params, &keys, shared);
    }
  } else {
    reduce_rows(params, &rows, shared, warpgroup);
  }
}

// Second pass: each key's weight summed over the probe rows that see it. Keys are held, rows stream.

// The keys of a block against one part of the rows of their head. Early keys, which more probes see, come first: the
// items of a wave are about as long as each other.
template <typename Traits>
struct KeysItem {
  int b, h, first_key, row_split, first_tile, tile_step, last_tile;  // tiles of kStreamRows rows

  __device__ __forceinline__ KeysItem(const ProbeScoresParams& params, int item) {
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
__host__ __device__ __forceinline__ int key_items(const ProbeScoresParams& params) {
  return params.batch * params.kv_heads * params.row_splits * ceil_div(params.tokens, Traits::kBlockRows);
}

// Minimum and maximum limit of the rows of a tile.
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
  for (TileScheduler scheduler(key_items<Traits>(params)); scheduler.valid(); scheduler.next()) {
    const KeysItem<Traits> item(params, scheduler.item());
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
__device__ __forceinline__ void sum_columns(const ProbeScoresParams& params, const CUtensorMap* keys,
                                            SharedStorage<Traits>& shared, int warpgroup) {
  Consumer<Traits> consumer{shared, warpgroup};
  const int key_of_thread = threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + threadIdx.x % kWarpThreads / 4;
  for (TileScheduler scheduler(key_items<Traits>(params)); scheduler.valid(); scheduler.next()) {
    const KeysItem<Traits> item(params, scheduler.item());
    const int first_key = item.first_key + warpgroup * kUnitRows;
    const int last_key = first_key + kUnitRows - 1;
    consumer.load_held(keys, first_key, item.h, item.b);
    consumer.wait_held();
    float sum[2] = {0.0F, 0.0F};
    for (int tile = item.first_tile; tile < item.last_tile; tile += item.tile_step) {
      const int2 range = tile_range<Traits>(params, item.b, tile);
      if (range.y < item.first_key) {
        continue;
      }
      consumer.wait_tile();
      if (range.y >= first_key) {
        float s[Consumer<Traits>::kScores];
        consumer.multiply_tile(s);
        const float* lse = shared.lse[consumer.place.index];
        const std::int32_t* limit = shared.limit[consumer.place.index];
        if (last_key <= range.x) {
          add_column_sums<false>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
        } else {
          add_column_sums<true>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
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
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == Traits::kConsumers) {
    if (threadIdx.x % kWarpThreads == 0) {
      stream_rows(params, &rows, shared);
    }
  } else {
    sum_columns(params, &keys, shared, warpgroup);
  }
}

}  // namespace zipvl::cuda::probe_scores::sm90
