// A block of the kernel that takes both passes: its shared memory, and how probe rows and keys come into it.
#pragma once

#include <cuda.h>

#include "cuda/probe_scores/plan.h"
#include "cuda/probe_scores/probe_scores.h"
#include "cuda/probe_scores/probes.cuh"
#include "cuda/probe_scores/sm90/traits.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/tma.cuh"

namespace zipvl::cuda::probe::sm90 {

template <typename ElementType, int HeadDim>
struct ClusterTraits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kWarpgroups = plan::kProbeClusterUnits;
  static constexpr int kThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kRows = kWarpgroups * kUnitRows;
  static constexpr int kTileKeys = plan::kProbeTileKeys;
  static constexpr int kTiles = plan::probe_cluster_keys(HeadDim) / kTileKeys;
  static constexpr int kMaxBlocks = plan::kProbeClusterBlocks;
  static constexpr int kSlabs = (HeadDim + kSlabColumns - 1) / kSlabColumns;
  static constexpr int kPieces = HeadDim / kPieceElements;
  static constexpr std::uint32_t kTileBytes = kSlabs * kTileKeys * kSlabColumns * sizeof(Element);
  static_assert(kUnitRows == plan::kProbeUnitRows);
};

// Operands lie in slabs of 64 columns under the 128-byte swizzle, so that 64 rows of either are the first operand of a
// product and 128 the second.
template <typename Traits>
struct ClusterShared {
  alignas(1024) typename Traits::Element rows[Traits::kSlabs][Traits::kRows * kSlabColumns];
  alignas(1024) typename Traits::Element keys[Traits::kTiles][Traits::kSlabs][Traits::kTileKeys * kSlabColumns];
  float part_lse[Traits::kMaxBlocks][Traits::kRows];  // over each block's keys
  alignas(16) float lse[Traits::kRows];
  alignas(16) std::int32_t limit[Traits::kRows];
  alignas(16) std::int64_t source[Traits::kRows];  // where a row starts in q, in elements; -1: no probe
  float sums[Traits::kTiles * Traits::kTileKeys];
  int2 range[Traits::kWarpgroups][2];                            // least and greatest limit of 32 rows
  std::uint32_t words[Traits::kTiles * Traits::kTileKeys / 32];  // of the packed mask; unused where there is none
  int first_real;                                                // of this block's keys
  int first_real_of[Traits::kMaxBlocks];                         // of each block's
  std::uint64_t keys_here[Traits::kTiles], parts_here;           // mbarriers
};

// Which rows and keys a block has. The tiles of keys go round the blocks of the cluster, so that each has early keys,
// which more probes see, and late ones; and a cluster has every so many'th unit of rows.
template <typename Traits>
struct ClusterItem {
  int b, h, part, rank, size, tiles;

  __device__ __forceinline__ ClusterItem(const ProbeScoresParams& params)
      : rank(static_cast<int>(blockIdx.x) % params.cluster_blocks), size(params.cluster_blocks) {
    int cluster = static_cast<int>(blockIdx.x) / params.cluster_blocks;
    part = cluster % params.row_splits;
    cluster /= params.row_splits;
    h = cluster % params.kv_heads;
    b = cluster / params.kv_heads;
    const int all = (params.tokens + Traits::kTileKeys - 1) / Traits::kTileKeys;
    tiles = (all - rank + size - 1) / size;
  }

  // The first key of the block's tile `t`.
  __device__ __forceinline__ int first_key(int t) const { return (rank + t * size) * Traits::kTileKeys; }

  __device__ __forceinline__ int first_row(const ProbeScoresParams& params, int slot) const {
    return (part + slot * params.row_splits) * kUnitRows;
  }
};

template <typename Traits>
__device__ __forceinline__ void load_keys(ClusterShared<Traits>& shared, const ClusterItem<Traits>& item,
                                          const CUtensorMap* keys) {
  for (int t = 0; t < item.tiles; ++t) {
    ptx::mbarrier_arrive_expect_tx(&shared.keys_here[t], Traits::kTileBytes);
#pragma unroll
    for (int slab = 0; slab < Traits::kSlabs; ++slab) {
      ptx::tma_load_4d(shared.keys[t][slab], keys, &shared.keys_here[t], slab * kSlabColumns, item.first_key(t), item.h,
                       item.b);
    }
  }
}

// A warpgroup finds the rows of its slot, and with its other warps packs its part of the mask.
template <typename Traits>
__device__ __forceinline__ void place_rows(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                           const ClusterItem<Traits>& item, int slot) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const int warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  if (thread < kUnitRows) {
    const int group = params.query_heads / params.kv_heads;
    const int row = item.first_row(params, slot) + thread;
    int limit = -1;
    std::int64_t source = -1;
    if (row < params.rows) {
      const int position = new_probe_position(params, item.b, row / group);
      limit = limit_of(params, position);
      if (limit >= 0) {
        source = item.b * params.q_stride[0] + (item.h * group + row % group) * params.q_stride[1] +
                 position * params.q_stride[2];
      }
    }
    shared.limit[slot * kUnitRows + thread] = limit;
    shared.source[slot * kUnitRows + thread] = source;
    const int least = __reduce_min_sync(0xFFFFFFFFU, limit), most = __reduce_max_sync(0xFFFFFFFFU, limit);
    if (lane == 0) {
      shared.range[slot][warp] = make_int2(least, most);
    }
  } else if (params.token_mask != nullptr) {
    constexpr int kPackers = 2 * Traits::kWarpgroups;  // warps
    const bool* mask = params.token_mask + item.b * params.mask_stride[0];
    for (int word = slot * 2 + warp - 2; word < item.tiles * (Traits::kTileKeys / 32); word += kPackers) {
      const int first = item.first_key(word / (Traits::kTileKeys / 32)) + word % (Traits::kTileKeys / 32) * 32;
      const int token = first + lane;
      const unsigned bits = __ballot_sync(0xFFFFFFFFU, token < params.tokens && mask[token * params.mask_stride[1]]);
      if (lane == 0) {
        shared.words[word] = bits;
        if (bits != 0) {
          atomicMin(&shared.first_real, first + __ffs(static_cast<int>(bits)) - 1);
        }
      }
    }
  }
}

// The elements of a row at its swizzled place; zeros where the row is no probe. A warpgroup copies its own 64 rows.
template <typename Traits>
__device__ __forceinline__ void gather_rows(const ProbeScoresParams& params, ClusterShared<Traits>& shared, int slot) {
  const auto* q = static_cast<const std::uint16_t*>(params.q);
  const auto for_pieces = [&](const auto& copy) {
#pragma unroll
    for (int i = 0; i < kUnitRows * Traits::kPieces / kWarpgroupThreads; ++i) {
      const int of_slot = i * kWarpgroupThreads + static_cast<int>(threadIdx.x) % kWarpgroupThreads;
      const int row = slot * kUnitRows + of_slot / Traits::kPieces, piece = of_slot % Traits::kPieces;
      const std::int64_t start = shared.source[row];
      auto* target = &shared.rows[piece / 8][row * kSlabColumns + (piece % 8 ^ row % 8) * kPieceElements];
      copy(target, q + (start < 0 ? 0 : start) + piece * kPieceElements, start >= 0);
    }
  };
  const bool aligned = has_aligned_pieces(params);
  if (aligned && !params.negate) {
    for_pieces([](auto* target, const std::uint16_t* source, bool valid) {
      ptx::cp_async_16(ptx::shared_address(target), source, valid);
    });
  } else {
    for_pieces([&](auto* target, const std::uint16_t* source, bool valid) {
      *reinterpret_cast<uint4*>(target) = valid ? load_piece(params, source, aligned) : make_uint4(0, 0, 0, 0);
    });
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_view_async_shared();
}

}  // namespace zipvl::cuda::probe::sm90
