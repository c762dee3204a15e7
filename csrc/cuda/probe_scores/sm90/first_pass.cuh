// First pass: each probe row's maximum and sum over a chunk of keys. Rows are held, keys stream.
#pragma once

#include "cuda/probe_scores/probe_scores.h"
#include "cuda/probe_scores/sm90/pipeline.cuh"
#include "cuda/probe_scores/tile_math.cuh"

namespace zipvl::cuda::probe::sm90 {

// Rows of one head against one chunk of keys; the blocks of rows of a chunk are neighbours and share its keys in L2. A
// block takes every so many'th unit of 64 rows: early probes, which see few keys, and late ones, so that blocks are
// alike.
template <typename Traits>
struct FirstItem {
  int b, h, first_unit, unit_step, split, first_tile, last_tile;  // tiles of kStreamRows keys

  __device__ __forceinline__ FirstItem(const ProbeScoresParams& params, int item) {
    unit_step = (params.rows + Traits::kBlockRows - 1) / Traits::kBlockRows;
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

  // Least and greatest limit of a warpgroup's rows.
  __device__ __forceinline__ int2 range(const ProbeScoresParams& params, int warpgroup) const {
    const int units = params.rows_padded / kUnitRows;
    return unit(warpgroup) < units ? reinterpret_cast<const int2*>(
                                         params.unit_range)[static_cast<std::int64_t>(b) * units + unit(warpgroup)]
                                   : make_int2(-1, -1);
  }
};

template <typename Traits>
__host__ __device__ __forceinline__ int first_items(const ProbeScoresParams& params) {
  return params.batch * params.kv_heads * params.splits * ((params.rows + Traits::kBlockRows - 1) / Traits::kBlockRows);
}

template <typename Traits>
__device__ __forceinline__ void stream_keys(const ProbeScoresParams& params, const CUtensorMap* keys,
                                            SharedStorage<Traits>& shared) {
  PipelineState<Traits::kStages> place;
  for (ItemWalk walk(first_items<Traits>(params)); walk.valid(); walk.next()) {
    const FirstItem<Traits> item(params, walk.item());
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
  for (ItemWalk walk(first_items<Traits>(params)); walk.valid(); walk.next()) {
    const FirstItem<Traits> item(params, walk.item());
    const int first_row = item.unit(warpgroup) * kUnitRows;
    if (item.first_tile < item.last_tile) {
      consumer.request(rows, first_row, item.h, item.b);
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
      consumer.hold();
    }
    RowStats stats;
    for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
      const int first_key = tile * Traits::kStreamRows;
      consumer.await_tile();
      if (first_key > range.y) {
        consumer.release();
        continue;
      }
      float s[Consumer<Traits>::kScores];
      consumer.multiply(s);
      consumer.release();
      Words words;
      bool all_seen = first_key + Traits::kStreamRows - 1 <= range.x;
#pragma unroll
      for (int i = 0; i < Traits::kStreamRows / 32; ++i) {
        words[i] = 0xFFFFFFFFU;
        if (params.mask_words != nullptr) {
          words[i] = params.mask_words[item.b * static_cast<std::int64_t>(params.words) + first_key / 32 + i];
          all_seen = all_seen && words[i] == 0xFFFFFFFFU;
        }
      }
      if (!all_seen) {
        hide_keys(s, limit, first_key, words);
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
  const int warpgroup = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == Traits::kConsumers) {
    if (threadIdx.x % kWarpThreads == 0) {
      stream_keys(params, &keys, shared);
    }
  } else {
    reduce_rows(params, &rows, shared, warpgroup);
  }
}

}  // namespace zipvl::cuda::probe::sm90
