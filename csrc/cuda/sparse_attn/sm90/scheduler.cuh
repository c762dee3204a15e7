// Which tile a block works on next. A tile is a block of query rows of one head of one batch row. Under causal
// attention later blocks see more keys, so tiles go out from the last block to the first (longest first), all batch
// rows side by side at each level; `count` is read on the device, so batch rows may have any number of blocks.
#pragma once

#include <climits>

#include "cuda/sparse_attn/sm90/params.h"
#include "cuda/sparse_attn/sm90/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

// Selected tokens of a batch row, whatever stands in `count`.
__device__ __forceinline__ int selected(const AttnParams& params, int batch) {
  return min(max(__ldcg(params.count + batch * params.count_stride), 0), params.tokens);
}

// Keys that the tiles of a batch row read again and again: of ranged attention those of the packed selection, and none
// of a window, which moves on.
template <bool kRanged>
__device__ __forceinline__ int list_keys(const AttnParams& params, int batch) {
  if constexpr (kRanged) {
    return params.ranges.in_window ? 0 : min(max(__ldcg(params.count + batch * params.count_stride), 0), params.keys);
  } else {
    return selected(params, batch);
  }
}

template <bool kRanged>
__device__ __forceinline__ int query_rows(const AttnParams& params, int batch) {
  if constexpr (kRanged) {
    return params.ranges.num_rows == nullptr ? params.tokens
                                             : min(max(__ldcg(params.ranges.num_rows + batch), 0), params.tokens);
  } else {
    return params.all_queries ? params.tokens : selected(params, batch);
  }
}

// One warp makes the table: batch rows by descending number of blocks, equal ones in order. key_bytes: of a packed key
// and its value.
template <int BlockM, bool kRanged>
__device__ __forceinline__ void make_tile_table(const AttnParams& params, TileTable& table, int key_bytes, int lane) {
  int blocks[2], rank[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int b = lane + i * kWarpThreads;
    blocks[i] = b < params.batch ? (query_rows<kRanged>(params, b) + BlockM - 1) / BlockM : 0;
  }
  for (int other = 0; other < params.batch; ++other) {
    const int theirs = __shfl_sync(kAllLanes, other < kWarpThreads ? blocks[0] : blocks[1], other % kWarpThreads);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int b = lane + i * kWarpThreads;
      rank[i] += theirs > blocks[i] || (theirs == blocks[i] && other < b);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (const int b = lane + i * kWarpThreads; b < params.batch) {
      table.blocks[rank[i]] = blocks[i];
      table.batch[rank[i]] = b;
    }
  }
  __syncwarp();
  if (lane == 0) {
    int batches = 0, before = 0;
    std::int64_t head_bytes = 1;
    for (int b = 0; b < params.batch; ++b) {
      head_bytes += static_cast<std::int64_t>(list_keys<kRanged>(params, b)) * key_bytes;
    }
    table.section_heads = max(1, static_cast<int>(min(kL2Bytes / head_bytes, std::int64_t{params.kv_heads})));
    while (batches < params.batch && table.blocks[batches] > 0) {
      const int next = batches + 1 < params.batch ? table.blocks[batches + 1] : 0;
      table.before[batches] = before;
      before += (table.blocks[batches] - next) * (batches + 1);
      ++batches;
    }
    table.batches = batches;
    table.before[batches] = before;
  }
}

// Walks the block's tiles: for (TileWalk walk(params, table); walk.valid(); walk.next()). Every role of the block walks
// the same tiles by itself. Odd rounds go out in reverse, so that no block always gets the longest of its round.
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const AttnParams& params, const TileTable& table)
      : params_(params), table_(table) {}

  __device__ __forceinline__ bool valid() const { return place() < pairs() * params_.query_heads; }

  __device__ __forceinline__ void next() { ++round_; }

  __device__ __forceinline__ Tile tile() const {
    const int section_heads = table_.section_heads * params_.group;
    const int section = place() / (pairs() * section_heads);
    const int within = place() - section * pairs() * section_heads;
    const int first_head = section * section_heads;
    const int heads = min(section_heads, params_.query_heads - first_head);
    const int pair = within / heads;
    int sharing = 0;
    while (pair >= table_.before[sharing + 1]) {
      ++sharing;
    }
    const int offset = pair - table_.before[sharing];
    return {table_.batch[offset % (sharing + 1)], first_head + within % heads,
            table_.blocks[sharing] - 1 - offset / (sharing + 1)};
  }

 private:
  __device__ __forceinline__ int pairs() const { return table_.before[table_.batches]; }

  __device__ __forceinline__ int place() const {
    const int in_round = round_ % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round_ * static_cast<int>(gridDim.x) + in_round;
  }

  const AttnParams& params_;
  const TileTable& table_;
  int round_ = 0;
};

// How many packed keys the queries of a tile see: `last` the most (of its last row), `first` the fewest (of row `row`).
struct KeyRange {
  int first, last;
};

template <int BlockM>
__device__ __forceinline__ KeyRange keys_seen(const AttnParams& params, const Tile& tile, int row) {
  const int count = selected(params, tile.batch);
  if (!params.causal) {
    return {count, count};
  }
  const int begin = tile.block * BlockM;
  if (!params.all_queries) {
    return {min(begin + row + 1, count), min(begin + BlockM, count)};
  }
  const std::int32_t* seen = params.seen + static_cast<std::int64_t>(tile.batch) * params.tokens;
  return {__ldcg(seen + min(begin + row, params.tokens - 1)), __ldcg(seen + min(begin + BlockM, params.tokens) - 1)};
}

// The same of ranged attention: the blocks of keys that a tile visits, [first, end), and whether rows may see sinks.
// group(i): RowRanges::group of the tile's i-th 32 rows.
struct TileBlocks {
  int first, end;
  bool sinks;
};

template <typename Traits, typename Group>
__device__ __forceinline__ TileBlocks tile_blocks(const AttnParams& params, const Group& group) {
  int begin = INT_MAX, end = 0, max_begin = 0;
#pragma unroll
  for (int i = 0; i < Traits::kBlockM / kRowGroup; ++i) {
    const int4 of_rows = group(i);
    begin = min(begin, of_rows.x);
    end = max(end, of_rows.y);
    max_begin = max(max_begin, of_rows.z);
  }
  const bool sinks = params.ranges.num_sinks > 0 && max_begin > 0;
  if (begin >= end) {
    return {0, sinks ? 1 : 0, sinks};  // sinks alone: a block that no row sees
  }
  return {begin / Traits::kBlockN, (end + Traits::kBlockN - 1) / Traits::kBlockN, sinks};
}

// RowRanges::group of the tile's i-th 32 rows; rows past the end see nothing and count for nothing.
template <typename Traits>
__device__ __forceinline__ int4 load_group(const AttnParams& params, const Tile& tile, int i) {
  const int groups = (params.tokens + kRowGroup - 1) / kRowGroup;
  const int group = tile.block * (Traits::kBlockM / kRowGroup) + i;
  if (group >= groups) {
    return make_int4(INT_MAX, 0, 0, INT_MAX);
  }
  return __ldcg(params.ranges.group + static_cast<std::int64_t>(tile.batch) * groups + group);
}

}  // namespace zipvl::cuda::sparse_attn::sm90
