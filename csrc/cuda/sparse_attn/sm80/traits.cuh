// Tiles and shared memory of the portable kernel, for one element type and head dimension.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"

namespace zipvl::cuda::sparse_attn::sm80 {

constexpr int kChunkElements = 8;  // 16 bytes: what one copy or ldmatrix row takes
constexpr int kChunkBytes = 16;

// Stages: tiles of K and of V at hand. With two a tile's copies have a whole tile's time and one barrier is enough.
template <typename ElementType, int HeadDim, int Stages>
struct Traits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
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

  static constexpr int kRowBytes = HeadDim * 2;

  // Rows begin at multiples of 128 bytes (64 at D 96), so the eight rows of an ldmatrix would meet in the same banks.
  // The lowest bits of a chunk's place are xored with its row's: kPeriodChunks chunks swap places among themselves.
  static constexpr int kPeriodChunks = HeadDim % 64 == 0 ? 8 : 4;
  static_assert(HeadDim % (kPeriodChunks * kChunkElements) == 0);

  __device__ static constexpr int swizzle(int row) {
    return kPeriodChunks == 8 ? row % 8 : row / 2 % 4;  // at D 96 even and odd rows differ in bit 6 by themselves
  }

  // Of the first product's loop over the head dimension. Unrolled as a whole at D 128, the compiler brings so many
  // operands so early that it spills.
  static constexpr int kPeriodsAtOnce = HeadDim == 128 ? 1 : HeadDim / (kPeriodChunks * kChunkElements);

  // Byte offset of a chunk in a tile.
  __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * kChunkBytes;
  }
};

// What a block shares. A thread's registers are all taken by sums, so whatever is needed once a tile waits here too.
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
};

// Where chunk 2 * step + c of a row is, given where its chunk c is (0 or 1).
template <typename Traits>
__device__ __forceinline__ std::uint32_t step_address(std::uint32_t first, int step) {
  constexpr int kPeriodSteps = Traits::kPeriodChunks / 2;
  constexpr int kStepBytes = 2 * kChunkBytes;
  return (first ^ static_cast<std::uint32_t>(step % kPeriodSteps * kStepBytes)) +
         static_cast<std::uint32_t>(step / kPeriodSteps * kPeriodSteps * kStepBytes);
}

}  // namespace zipvl::cuda::sparse_attn::sm80
