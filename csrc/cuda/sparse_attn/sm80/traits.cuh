// Tiles and shared memory of the portable kernel, for one element type and head dimension.
#pragma once

#include <cstdint>

#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"

namespace zipvl::cuda::sparse_attn::sm80 {

// Stages: tiles of K and of V at hand. With two a tile's copies have a whole tile's time and one barrier is enough.
// Ranged: rows see what RowRanges says.
template <typename ElementType, int HeadDim, int Stages, bool Ranged>
struct Traits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
  static constexpr bool kRanged = Ranged;
  static constexpr int kStages = Stages;
  // At D 256 a warp's output leaves no registers for more than 16 rows, and K and V go through shared memory once for
  // each warp: its bandwidth is the limit, and eight warps on one tile halve what is copied into it.
  static constexpr bool kWide = HeadDim == 256 && Stages == 2;
  static constexpr int kWarps = kWide ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpThreads;
  static constexpr int kBlocksPerSm = kWide ? 1 : 2;
  // A warp owns kBlockM / kWarps query rows. Output and scores of a thread take
  // (kBlockM / kWarps) * (kHeadDim + kBlockN) / 32 registers: 192 at D 128 and 64, 160 at D 96 and 256. More spills.
  static constexpr int kBlockM = HeadDim == 256 && !kWide ? 64 : 128;
  static constexpr int kBlockN = HeadDim == 64 ? 128 : 64;
  static constexpr int kRowTiles = kBlockM / kWarps / 16;  // 16-row tiles of a warp

  using Rows = SwizzledRows<HeadDim>;  // of every tile

  // Of the first product's loop over the head dimension. Unrolled as a whole at D 128, the compiler brings so many
  // operands so early that it spills.
  static constexpr int kPeriodsAtOnce = HeadDim == 128 ? 1 : Rows::kPieces / Rows::kPeriodPieces;
};

// Ranged attention's part of a block's shared memory. Its tiles are those of the sinks, and then those of the rows'
// ranges, numbered through.
template <int BlockM, bool Ranged>
struct RangedStorage {};
template <int BlockM>
struct RangedStorage<BlockM, true> {
  int first[BlockM];           // a query row sees places [first, limit) of the list of keys
  int num_sinks, sink_tiles;   // sinks, which rows see as far as they are before `first`; tiles of them, or 0
  int first_tile;              // of the list of keys: the first of the ranges
  int clear_first, clear_end;  // every row sees places [clear_first, clear_end)
};

// A block's shared memory. A thread's registers are all taken by sums, so what is needed once a tile waits here too.
template <typename Traits>
struct SharedStorage {
  using Element = typename Traits::Element;
  alignas(128) Element q[Traits::kBlockM * Traits::kHeadDim];
  alignas(128) Element k[Traits::kStages][Traits::kBlockN * Traits::kHeadDim];
  alignas(128) Element v[Traits::kStages][Traits::kBlockN * Traits::kHeadDim];
  std::int32_t index[2][Traits::kBlockN];  // of tiles whose rows are copied now and next
  const Element *k_head, *v_head;          // token 0 of the key/value head
  const std::int32_t* index_row;
  std::uint32_t query_token[Traits::kBlockM];
  int limit[Traits::kBlockM];  // packed keys that a query row sees
  int seen;                    // the most of them
  int whole_tiles;             // that every query row sees whole
  int queries;                 // query rows that exist, at least 1
  [[no_unique_address]] RangedStorage<Traits::kBlockM, Traits::kRanged> ranged;
};

}  // namespace zipvl::cuda::sparse_attn::sm80
