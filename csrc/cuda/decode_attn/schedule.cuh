// Who works on what: every block of threads gets an equal share of all tiles there are, of all rows and heads in one
// line, by the lengths that only the device knows. So no block idles because a row is short, and what is allocated but
// unused costs nothing. An item is a (batch row, key/value head, chunk of query heads); a block's share crosses items,
// and leaves a partial result of each.
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

  __device__ __forceinline__ int count(int b) const { return min(max(counts[b * stride], 0), most); }
  __device__ __forceinline__ int tiles(int b) const { return (count(b) + tile - 1) / tile; }
};

struct Share {
  std::uint32_t total;         // tiles of everything, below 2**31
  std::uint32_t blocks;        // that have work: each has at least one tile
  std::uint32_t base, longer;  // each has `base` tiles, and the first `longer` ones one more

  // Block `i` has tiles [first(i), first(i + 1)).
  __device__ __forceinline__ std::uint32_t first(std::uint32_t i) const { return base * i + min(i, longer); }
  // The block that has tile x.
  __device__ __forceinline__ std::uint32_t owner(std::uint32_t x) const {
    const std::uint32_t turn = longer * (base + 1);
    return x < turn ? x / (base + 1) : longer + (x - turn) / base;
  }
};

// Every warp calls, and each computes the same. `least`: tiles that a block is worth starting for. Rows here and below:
// RowTiles, or what has its tiles(b), batch and items_per_row.
template <typename Rows>
__device__ __forceinline__ Share make_share(const Rows& rows, int blocks, int least) {
  std::uint32_t total = 0;
  for (int b = static_cast<int>(threadIdx.x % 32); b < rows.batch; b += 32) {
    total += static_cast<std::uint32_t>(rows.tiles(b));
  }
  total = __reduce_add_sync(0xFFFFFFFFU, total) * static_cast<std::uint32_t>(rows.items_per_row);
  const auto step = static_cast<std::uint32_t>(least);
  const std::uint32_t used = max(1U, min(static_cast<std::uint32_t>(blocks), (total + step - 1) / step));
  return {total, total == 0 ? 0 : used, total / used, total % used};
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
  for (int base = 0; base < rows.batch; base += 32) {
    const std::uint32_t own =
        base + lane < rows.batch ? static_cast<std::uint32_t>(rows.tiles(base + lane) * rows.items_per_row) : 0;
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
  for (int i = static_cast<int>(threadIdx.x % 32); i < b; i += 32) {
    before += static_cast<std::uint32_t>(rows.tiles(i));
  }
  return __reduce_add_sync(0xFFFFFFFFU, before) * static_cast<std::uint32_t>(rows.items_per_row);
}

}  // namespace zipvl::cuda::decode
