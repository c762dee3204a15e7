// Tiles of the portable kernels and the moves between memory, shared memory and registers. A block holds on to 128 rows
// of one operand as fragments in registers, 16 a warp, while tiles of 64 rows of the other stream past in two buffers.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/probe_scores/probes.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"

namespace zipvl::cuda::probe_scores::sm80 {

constexpr int kWarps = 8;
constexpr int kThreads = kWarpThreads * kWarps;
constexpr int kWarpRows = 16;                   // M of a product
constexpr int kBlockRows = kWarpRows * kWarps;  // held
constexpr int kStreamRows = 64;
constexpr int kScores = kStreamRows / 2;  // a thread's of a tile
static_assert(kBlockRows == 2 * kStreamRows, "the held rows pass through the two stream buffers");

template <typename ElementType, int HeadDim>
struct Traits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kPieces = HeadDim / kPieceElements;
  // Rows of 96 columns are padded to 128: one swizzle serves every head dimension.
  using Rows = SwizzledRows<round_up(HeadDim, 64)>;
  static constexpr int kTileBytes = kStreamRows * Rows::kRowBytes;
  static constexpr int kSharedBytes = 2 * kTileBytes;
  static constexpr int kSteps = HeadDim / 16;
  // At D 256 the held fragments alone take 64 registers.
  static constexpr int kBlocksEach = HeadDim == 256 ? 1 : 2;
};

// 64 rows from `source` (row `first` of `rows`, `stride` elements apart) into shared memory; zeros past the end.
template <typename Traits>
__device__ __forceinline__ void load_tile(std::uint32_t target, const typename Traits::Element* source, int first,
                                          int rows, std::int64_t stride) {
#pragma unroll 2  // all at once, their addresses would spill
  for (int i = threadIdx.x; i < kStreamRows * Traits::kPieces; i += kThreads) {
    const int row = i / Traits::kPieces, piece = i % Traits::kPieces;
    const bool inside = first + row < rows;
    ptx::cp_async_16(target + Traits::Rows::row(row) + Traits::Rows::in_row(row, piece),
                     source + (inside ? first + row : 0) * stride + piece * kPieceElements, inside);
  }
}

// The warp's 16 of the 128 rows that lie in the two buffers.
template <typename Traits>
__device__ __forceinline__ void hold(std::uint32_t (&held)[Traits::kSteps][4], std::uint32_t shared, int warp,
                                     int lane) {
  const int row = warp * kWarpRows + lane % 16;
#pragma unroll
  for (int k = 0; k < Traits::kSteps; ++k) {
    const int piece = 2 * k + lane / 16;
    ptx::ldmatrix(held[k], shared + Traits::Rows::row(row) + Traits::Rows::in_row(row, piece));
  }
}

// s = held rows x tile rows^T
template <typename Traits>
__device__ __forceinline__ void multiply(float (&s)[kScores], const std::uint32_t (&held)[Traits::kSteps][4],
                                         std::uint32_t tile, int lane) {
#pragma unroll
  for (float& x : s) {
    x = 0.0F;
  }
  const int row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int k = 0; k < Traits::kSteps; ++k) {
    const int piece = 2 * k + lane / 8 % 2;
#pragma unroll
    for (int n = 0; n < kStreamRows / 16; ++n) {
      std::uint32_t b[4];
      ptx::ldmatrix(b, tile + Traits::Rows::row(n * 16 + row) + Traits::Rows::in_row(row, piece));
      ptx::mma_16x8x16<typename Traits::Element>(reinterpret_cast<float (&)[4]>(s[8 * n]), held[k], b[0], b[1]);
      ptx::mma_16x8x16<typename Traits::Element>(reinterpret_cast<float (&)[4]>(s[8 * n + 4]), held[k], b[2], b[3]);
    }
  }
}

// Streams tiles first to last - 1 past the block: load(tile, address) copies one, use(tile, address) is called by all
// threads once it is there. The held rows, 128 of them, come first through the same buffers by hold_rows(address).
template <typename Traits, typename HoldRows, typename Load, typename Use>
__device__ __forceinline__ void stream_tiles(std::uint32_t shared, int first, int last,
                                             std::uint32_t (&held)[Traits::kSteps][4], HoldRows&& hold_rows,
                                             Load&& load, Use&& use) {
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  hold_rows(shared);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  hold<Traits>(held, shared, warp, lane);
  __syncthreads();
  if (first < last) {
    load(first, shared);
  }
  ptx::cp_async_commit();
  for (int tile = first; tile < last; ++tile) {
    const int buffer = (tile - first) % 2;
    if (tile + 1 < last) {
      load(tile + 1, shared + (1 - buffer) * Traits::kTileBytes);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    use(tile, shared + buffer * Traits::kTileBytes);
    __syncthreads();
  }
}

}  // namespace zipvl::cuda::probe_scores::sm80
