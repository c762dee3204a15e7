// Who works on what, by the lengths that only the device knows: what is allocated but unused costs nothing. An item is
// a (batch row, key/value head, chunk of query heads). There are two forms:
//
//   apart        every item has as many blocks of threads to itself as every other one, and its tiles are shared out
//                among them: a block has one piece and leaves one partial result. Taken where no block gets much more
//                to do than on an average.
//   in one line  all tiles of all items stand in one line, of which every block gets an equal share: no block idles
//                because a row is short. A share crosses items, and leaves a partial result of each. For rows of very
//                different lengths, and for more items than blocks.
#pragma once

#include <cstdint>

namespace zipvl::cuda::decode {

// Tiles of row b, from the device's counts.
struct RowTiles {
  const std::int32_t* counts;  // [batch]: tokens, or blocks of tokens
  std::int64_t stride;
  int most;  // counts are clamped to [0, most]
  int tile;  // of the counts' units in a tile
  int batch, items_per_row;

  // What is read of a row's counts: past the first-level cache, for the combining kernel reads them before it waits.
  using Counts = int;
  __device__ __forceinline__ Counts count(int b) const { return min(max(__ldcg(counts + b * stride), 0), most); }
  __device__ __forceinline__ int tiles(Counts count) const { return (count + tile - 1) / tile; }
};

// `total` tiles in consecutive shares, one a block of threads.
struct Shares {
  std::uint32_t count;         // that have tiles
  std::uint32_t base, longer;  // each has `base` tiles, and the first `longer` ones one more

  // least: tiles that a block is worth starting for; most: blocks that there are.
  __device__ __forceinline__ Shares(std::uint32_t total, std::uint32_t most, std::uint32_t least)
      : count(min(most, (total + least - 1) / least)) {
    const std::uint32_t among = max(count, 1U);
    base = total / among;
    longer = total - base * among;
  }

  // Share `i` is tiles [first(i), first(i + 1)).
  __device__ __forceinline__ std::uint32_t first(std::uint32_t i) const { return base * i + min(i, longer); }
  // The share that has tile x.
  __device__ __forceinline__ std::uint32_t owner(std::uint32_t x) const {
    const std::uint32_t turn = longer * (base + 1);
    return x < turn ? x / (base + 1) : longer + (x - turn) / base;
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
__device__ __forceinline__ Load measure(const Rows& rows, const typename Rows::Counts& counts) {
  if (rows.batch == 1) {
    const auto tiles = static_cast<std::uint32_t>(rows.tiles(counts));
    return {tiles * static_cast<std::uint32_t>(rows.items_per_row), tiles};
  }
  std::uint32_t total = 0, largest = 0;
#pragma unroll 1
  for (int b = static_cast<int>(threadIdx.x % 32); b < rows.batch; b += 32) {
    const auto tiles = static_cast<std::uint32_t>(rows.tiles(rows.count(b)));
    total += tiles;
    largest = max(largest, tiles);
  }
  return {__reduce_add_sync(0xFFFFFFFFU, total) * static_cast<std::uint32_t>(rows.items_per_row),
          __reduce_max_sync(0xFFFFFFFFU, largest)};
}

// Blocks that an item has to itself, if any.
template <typename Rows>
__device__ __forceinline__ int blocks_of_item(const Rows& rows, int blocks) {
  return blocks / (rows.batch * rows.items_per_row);
}

// Whether items stay apart: the largest share is then at most an eighth and `slack` tiles, about what a second piece
// costs a block, above the average.
__device__ __forceinline__ bool stay_apart(const Load& load, int blocks, int of_item, int slack) {
  const auto all = static_cast<std::uint64_t>(blocks);
  return of_item > 0 && load.largest * all * 8 <= of_item * (std::uint64_t{load.total} * 9 + slack * all * 8);
}

// Row `b`, whose tiles begin at `first` in the line.
struct RowPlace {
  int b;
  std::uint32_t first;
};

// The row that has tile x of the line; every lane of a warp calls with the same x, which is less than the total.
template <typename Rows>
__device__ __forceinline__ RowPlace find_row(const Rows& rows, std::uint32_t x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::uint32_t before = 0;
#pragma unroll 1
  for (int base = 0; base < rows.batch; base += 32) {
    const std::uint32_t own = base + lane < rows.batch
                                  ? static_cast<std::uint32_t>(rows.tiles(rows.count(base + lane)) * rows.items_per_row)
                                  : 0;
    std::uint32_t end = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const std::uint32_t other = __shfl_up_sync(0xFFFFFFFFU, end, offset);
      end += lane >= offset ? other : 0;
    }
    end += before;
    const unsigned past = __ballot_sync(0xFFFFFFFFU, x < end);
    if (past != 0) {
      const int found = __ffs(static_cast<int>(past)) - 1;
      return {base + found, __shfl_sync(0xFFFFFFFFU, end - own, found)};
    }
    before = __shfl_sync(0xFFFFFFFFU, end, 31);
  }
  return {rows.batch, before};
}

// Where row b's tiles begin in the line.
template <typename Rows>
__device__ __forceinline__ std::uint32_t row_first(const Rows& rows, int b) {
  std::uint32_t before = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x % 32); i < b; i += 32) {
    before += static_cast<std::uint32_t>(rows.tiles(rows.count(i)));
  }
  return __reduce_add_sync(0xFFFFFFFFU, before) * static_cast<std::uint32_t>(rows.items_per_row);
}

}  // namespace zipvl::cuda::decode
