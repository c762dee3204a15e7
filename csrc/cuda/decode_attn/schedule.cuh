// The split-KV scheduler: which block of threads attends to which tiles, by the lengths that only the device knows.
// Slots that are allocated but unused cost nothing. A work item is a (batch row, key/value head, chunk of query heads);
// a split is a range of an item's tiles, attended to by one block, which leaves one partial result. There are two
// forms:
//
//   fixed split  every item has the same number of blocks to itself, and its tiles are split evenly among them: a block
//                has one split. Taken where no block gets much more to do than on an average.
//   stream-K     the tiles of all items stand in one line, of which every block gets an equal range: no block idles
//                because a row is short. A range that crosses items is a split of each. For rows of very different
//                lengths, and for more items than blocks.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/common/warp.cuh"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/warp_state.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda::decode_attn {

// Tiles of row b, from the device's counts.
struct RowTiles {
  const std::int32_t* counts;  // [batch]: tokens, or blocks of tokens
  std::int64_t stride;
  int max_count;  // counts are clamped to [0, max_count]
  int tile;       // of the counts' units in a tile
  int batch, items_per_row;

  // What is read of a row's counts: past the first-level cache, for the combining kernel reads them before it waits.
  using Counts = int;
  __device__ __forceinline__ Counts count(int b) const { return min(max(__ldcg(counts + b * stride), 0), max_count); }
  __device__ __forceinline__ int tiles(Counts count) const { return ceil_div(count, tile); }
};

// `total` tiles in consecutive ranges of about equal length, one a block of threads.
struct EvenSplits {
  std::uint32_t count;         // that have tiles
  std::uint32_t base, longer;  // each has `base` tiles, and the first `longer` ones one more

  // min_tiles: that a block is worth starting for.
  __device__ __forceinline__ EvenSplits(std::uint32_t total, std::uint32_t blocks, std::uint32_t min_tiles)
      : count(min(blocks, ceil_div(total, min_tiles))) {
    const std::uint32_t divisor = max(count, 1U);
    base = total / divisor;
    longer = total - base * divisor;
  }

  // Range `i` is tiles [first(i), first(i + 1)).
  __device__ __forceinline__ std::uint32_t first(std::uint32_t i) const { return base * i + min(i, longer); }
  // The range that has tile x.
  __device__ __forceinline__ std::uint32_t owner(std::uint32_t x) const {
    const std::uint32_t end_of_longer = longer * (base + 1);
    return x < end_of_longer ? x / (base + 1) : longer + (x - end_of_longer) / base;
  }
};

// Tiles of everything.
struct Load {
  std::uint32_t total;    // below 2**31
  std::uint32_t largest;  // of an item
};

// Every lane of a warp calls. Rows here and below: RowTiles, or what has its Counts, count(b), tiles(counts), batch and
// items_per_row. counts: of any row.
template <typename Rows>
__device__ __forceinline__ Load measure_load(const Rows& rows, const typename Rows::Counts& counts) {
  if (rows.batch == 1) {
    const auto tiles = static_cast<std::uint32_t>(rows.tiles(counts));
    return {tiles * static_cast<std::uint32_t>(rows.items_per_row), tiles};
  }
  std::uint32_t total = 0, largest = 0;
#pragma unroll 1
  for (int b = static_cast<int>(threadIdx.x % kWarpThreads); b < rows.batch; b += kWarpThreads) {
    const auto tiles = static_cast<std::uint32_t>(rows.tiles(rows.count(b)));
    total += tiles;
    largest = max(largest, tiles);
  }
  return {__reduce_add_sync(kAllLanes, total) * static_cast<std::uint32_t>(rows.items_per_row),
          __reduce_max_sync(kAllLanes, largest)};
}

// Blocks that an item has to itself in a fixed split, if any.
template <typename Rows>
__device__ __forceinline__ int blocks_per_item(const Rows& rows, int blocks) {
  return blocks / (rows.batch * rows.items_per_row);
}

// Whether the form is the fixed split: the largest split is then at most an eighth and `slack` tiles, about what a
// second split costs a block, above the average.
__device__ __forceinline__ bool is_fixed_split(const Load& load, int blocks, int per_item, int slack) {
  const auto all = static_cast<std::uint64_t>(blocks);
  return per_item > 0 && load.largest * all * 8 <= per_item * (std::uint64_t{load.total} * 9 + slack * all * 8);
}

// Row `b`, whose tiles begin at `first` in the line.
struct RowStart {
  int b;
  std::uint32_t first;
};

// The row that has tile x of the line; every lane of a warp calls with the same x, which is less than the total.
template <typename Rows>
__device__ __forceinline__ RowStart find_row(const Rows& rows, std::uint32_t x) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  std::uint32_t before = 0;
#pragma unroll 1
  for (int base = 0; base < rows.batch; base += kWarpThreads) {
    const std::uint32_t own = base + lane < rows.batch
                                  ? static_cast<std::uint32_t>(rows.tiles(rows.count(base + lane)) * rows.items_per_row)
                                  : 0;
    std::uint32_t end = own;
    for (int offset = 1; offset < kWarpThreads; offset *= 2) {
      const std::uint32_t other = __shfl_up_sync(kAllLanes, end, offset);
      end += lane >= offset ? other : 0;
    }
    end += before;
    const unsigned past = __ballot_sync(kAllLanes, x < end);
    if (past != 0) {
      const int found = __ffs(static_cast<int>(past)) - 1;
      return {base + found, __shfl_sync(kAllLanes, end - own, found)};
    }
    before = __shfl_sync(kAllLanes, end, kWarpThreads - 1);
  }
  return {rows.batch, before};
}

// Where row b's tiles begin in the line.
template <typename Rows>
__device__ __forceinline__ std::uint32_t row_first(const Rows& rows, int b) {
  std::uint32_t before = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x % kWarpThreads); i < b; i += kWarpThreads) {
    before += static_cast<std::uint32_t>(rows.tiles(rows.count(i)));
  }
  return __reduce_add_sync(kAllLanes, before) * static_cast<std::uint32_t>(rows.items_per_row);
}

// A work item: query heads [first_head, first_head + heads) of batch row b, of key/value head `head`.
struct WorkItem {
  int b, in_row, head, first_head, heads;

  __device__ __forceinline__ WorkItem(const DecodeAttnParams& params, int row, int item)
      : b(row), in_row(item), head(item / params.head_chunks) {
    const int group = static_cast<int>(params.query_heads) / static_cast<int>(params.kv_heads);
    const int before = (item - head * params.head_chunks) * kDecodeHeads;
    first_head = head * group + before;
    heads = min(group - before, kDecodeHeads);
  }
};

// A split: tiles [first, end) of an item. Counts: of its row.
template <typename Counts>
struct Split {
  int b, head, first_head, heads, first, end;
  Counts counts;
};

// Waits for the kernel before this one, then attends to the block's splits, one after the other. attend(state, split):
// the calling warp's part of a split; it may use `warp_bytes` of `shared`, the warp's own, and leaves no copy to it
// under way. MinTiles: as in EvenSplits.
template <int D, int Warps, int MinTiles, typename Rows, typename Attend>
__device__ __forceinline__ void for_each_split(const DecodeAttnParams& params, const Rows& rows, unsigned char* shared,
                                               int warp_bytes, const Attend& attend) {
  // What attend() has no registers for. First what is known before any count is, the block's item in a fixed split:
  // found while the kernel before this one ends, and through shared memory, or the compiler would find it afterwards.
  __shared__ volatile struct Kept {
    int b, head, first_head, heads, per_item, part, partial;
    std::uint32_t at, last;
  } kept;
  static_assert(sizeof(kept) <= kBlockBytes);
  const auto block = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    const int items = rows.batch * rows.items_per_row, per_item = blocks_per_item(rows, params.blocks);
    const int number = min(block / max(per_item, 1), items - 1), row = number / rows.items_per_row;
    const WorkItem item(params, row, number - row * rows.items_per_row);
    kept.b = item.b;
    kept.head = item.head;
    kept.first_head = item.first_head;
    kept.heads = item.heads;
    kept.per_item = per_item;
    kept.part = block - number * per_item;
    kept.partial = block;
    kept.at = 0;
    kept.last = 0;
  }
  __syncthreads();
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();  // after the wait: what starts then reads counts that earlier kernels wrote

  Split<typename Rows::Counts> split{kept.b, kept.head, kept.first_head, kept.heads, 0, 0, {}};
  split.counts = rows.count(split.b);
  const int per_item = kept.per_item;
  const Load load = measure_load(rows, split.counts);
  std::uint32_t at = 0, last = 0;  // in the line, where the form is stream-K
  if (is_fixed_split(load, params.blocks, per_item, MinTiles)) {
    const auto part = static_cast<std::uint32_t>(kept.part);
    const EvenSplits splits(static_cast<std::uint32_t>(rows.tiles(split.counts)), static_cast<std::uint32_t>(per_item),
                            MinTiles);
    if (part >= splits.count) {
      return;
    }
    split.first = static_cast<int>(splits.first(part));
    split.end = static_cast<int>(splits.first(part + 1));
  } else {
    const EvenSplits splits(load.total, static_cast<std::uint32_t>(params.blocks), MinTiles);
    if (static_cast<std::uint32_t>(block) >= splits.count) {
      return;
    }
    at = splits.first(static_cast<std::uint32_t>(block));
    last = splits.first(static_cast<std::uint32_t>(block) + 1);
  }
  do {
    if (at < last) {
      const RowStart row = find_row(rows, at);
      split.counts = rows.count(row.b);
      const auto of_row = static_cast<std::uint32_t>(rows.tiles(split.counts));
      const std::uint32_t in_row = (at - row.first) / of_row, first = at - row.first - in_row * of_row;
      const WorkItem item(params, row.b, static_cast<int>(in_row));
      split = {item.b,
               item.head,
               item.first_head,
               item.heads,
               static_cast<int>(first),
               static_cast<int>(min(of_row, first + last - at)),
               split.counts};
      at += static_cast<std::uint32_t>(split.end - split.first);
      __syncthreads();  // the split before has been merged
      if (threadIdx.x == 0) {
        kept.heads = item.heads;
        kept.partial = block + row.b * rows.items_per_row + item.in_row;
        kept.at = at;
        kept.last = last;
      }
    }
    WarpState<D> state;
    attend(state, split);
    store_state(state, reinterpret_cast<float*>(shared + threadIdx.x / kWarpThreads * warp_bytes));
    __syncthreads();
    at = kept.at;
    last = kept.last;
    merge_warps<D, Warps>(reinterpret_cast<const float*>(shared), warp_bytes / static_cast<int>(sizeof(float)),
                          kept.heads, params.partials, kept.partial);
  } while (at < last);
}

}  // namespace zipvl::cuda::decode_attn
