// The producer warpgroup: K and V tiles by the copy engine, query rows gathered with cp.async, and zeros written to the
// rows of the output that nobody selected.
#pragma once

#include <cuda.h>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sparse_attn/sm90/scheduler.cuh"

namespace zipvl::cuda::attn::sm90 {

// One thread. Keys of a tile go from the last block to the first; values follow one block behind, as they are used.
template <typename Traits>
__device__ __forceinline__ void load_keys_values(const AttnParams& params, const CUtensorMap* k_map,
                                                 const CUtensorMap* v_map, SharedStorage<Traits>& shared) {
  constexpr int kBlockN = Traits::kBlockN;
  StageParity k_parity, v_parity;
  const auto load = [&](const CUtensorMap* map, typename Traits::Element* target, std::uint64_t* full,
                        std::uint64_t* empty, StageParity& parity, int stage, const Tile& tile, int block) {
    ptx::mbarrier_wait(&empty[stage], parity.of(stage) ^ 1);
    ptx::mbarrier_arrive_expect(&full[stage], Traits::kKeyBytes);
#pragma unroll
    for (int slab = 0; slab < Traits::kSlabs; ++slab) {
      ptx::tma_load_4d(target + stage * Traits::kKeyElements + slab * kBlockN * kSlabColumns, map, &full[stage],
                       slab * kSlabColumns, block * kBlockN, tile.head / params.group, tile.batch);
    }
    parity.flip(stage);
  };
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    const int blocks = (keys_seen<Traits::kBlockM>(params, tile, 0).last + kBlockN - 1) / kBlockN;
    for (int i = 0; i <= blocks && blocks > 0; ++i) {
      if (i < blocks) {
        load(k_map, shared.k[0], shared.k_full, shared.k_empty, k_parity, i % 2, tile, blocks - 1 - i);
      }
      if (i > 0) {
        load(v_map, shared.v[0], shared.v_full, shared.v_empty, v_parity, (i - 1) % 2, tile, blocks - i);
      }
    }
  }
}

// `warp` of kQueryWarps warps: its share of each tile's query rows, into the swizzled layout of the copy engine. Rows
// past the end repeat row 0 and are never stored.
template <typename Traits>
__device__ __forceinline__ void load_queries(const AttnParams& params, SharedStorage<Traits>& shared, int warp,
                                             int lane) {
  constexpr int kRows = Traits::kBlockM / kQueryWarps;  // of this warp
  constexpr int kPieces = Traits::kSlabs * 8;           // of 16 bytes in a row of the slabs
  constexpr int kRowsAtOnce = kWarpThreads / (kPieces < 32 ? kPieces : 32);
  constexpr int kPieceElements = 16 / sizeof(typename Traits::Element);
  static_assert(kPieces <= kWarpThreads && kRows % kWarpThreads == 0);
  const int piece = lane % kPieces, row_of_lane = lane / kPieces;
  const bool inside = piece * kPieceElements < Traits::kHeadDim;
  RingPlace<Traits::kQueryStages> place;
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    const int rows = query_rows(params, tile.batch);
    const std::int32_t* index = params.index + tile.batch * params.index_stride[0];
    const auto* q = static_cast<const typename Traits::Element*>(params.q) + tile.batch * params.q_stride[0] +
                    tile.head * params.q_stride[1] + piece * kPieceElements;
    int position[kRows / kWarpThreads];
#pragma unroll
    for (int i = 0; i < kRows / kWarpThreads; ++i) {
      const int row = tile.block * Traits::kBlockM + warp * kRows + i * kWarpThreads + lane;
      position[i] = 0;
      if (row < rows) {
        position[i] = params.all_queries ? row : min(max(index[row * params.index_stride[1]], 0), params.tokens - 1);
      }
    }
    ptx::mbarrier_wait(&shared.q_empty[place.stage], place.parity ^ 1);
    const std::uint32_t target = ptx::shared_address(shared.q[place.stage]) + (piece / 8) * Traits::kBlockM * 128;
#pragma unroll
    for (int i = 0; i < kRows / kWarpThreads; ++i) {
#pragma unroll 4
      for (int step = 0; step < kWarpThreads; step += kRowsAtOnce) {
        const int row = warp * kRows + i * kWarpThreads + step + row_of_lane;
        const int from = __shfl_sync(0xFFFFFFFFU, position[i], step + row_of_lane);
        if (inside) {
          ptx::cp_async_16(target + row * 128 + ((piece % 8) ^ (row % 8)) * 16, q + from * params.q_stride[2]);
        }
      }
    }
    ptx::mbarrier_arrive_after_cp_async(&shared.q_full[place.stage]);
    place.advance();
  }
}

// The first place of an ascending row of `count` positions whose position is at least `token`.
__device__ __forceinline__ int first_place_from(const std::int32_t* index, std::int64_t stride, int count, int token) {
  int begin = 0, end = count;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (index[middle * stride] < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// One warp: the tokens of the block's share that nobody selected. Shares are equal in tokens, because the selection may
// be all at one end. Tokens between two that are selected are one run of bytes in the output, which the copy engine
// fills from a piece of shared zeros while the tensor cores work: a lane takes a short gap, and the warp a long one.
template <typename Traits>
__device__ __forceinline__ void write_zeros(const AttnParams& params, SharedStorage<Traits>& shared, int lane) {
  constexpr int kLongGap = 16;  // tokens
  for (int i = lane; i < kZeroBytes / 16; i += kWarpThreads) {
    reinterpret_cast<uint4*>(shared.zeros)[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async_shared();
  __syncwarp();
  const std::int64_t token_bytes =
      static_cast<std::int64_t>(params.query_heads) * Traits::kHeadDim * sizeof(typename Traits::Element);
  // Every `step`-th piece of the tokens from begin to end, from piece `piece` on.
  const auto fill = [&](unsigned char* out, int begin, int end, int piece, int step) {
    const std::int64_t bytes = (end - begin) * token_bytes;
    for (std::int64_t at = std::int64_t{piece} * kZeroBytes; at < bytes; at += std::int64_t{step} * kZeroBytes) {
      const std::int64_t left = bytes - at;
      ptx::bulk_store(out + begin * token_bytes + at, shared.zeros,
                      left < kZeroBytes ? static_cast<std::uint32_t>(left) : kZeroBytes);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<4>();
  };
  const int share = (params.tokens + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int first = min(static_cast<int>(blockIdx.x) * share, params.tokens), last = min(first + share, params.tokens);
  for (int b = 0; b < params.batch && first < last; ++b) {
    const int count = selected(params, b);
    const std::int32_t* index = params.index + b * params.index_stride[0];
    const std::int64_t stride = params.index_stride[1];
    auto* out = static_cast<unsigned char*>(params.out) + b * params.tokens * token_bytes;
    const int start = first_place_from(index, stride, count, first);
    for (int place = start; place <= count; place += kWarpThreads) {
      // The gap before this lane's place, within the share.
      const int j = place + lane;
      const int begin = j == start   ? first
                        : j <= count ? min(max(index[(j - 1) * stride], first - 1), last - 1) + 1
                                     : last;
      const int end = j < count ? min(max(index[j * stride], begin), last) : last;
      const bool is_long = end - begin > kLongGap;
      if (begin < end && !is_long) {
        fill(out, begin, end, 0, 1);
      }
      for (unsigned lanes = __ballot_sync(0xFFFFFFFFU, is_long); lanes != 0; lanes &= lanes - 1) {
        const int owner = __ffs(static_cast<int>(lanes)) - 1;
        fill(out, __shfl_sync(0xFFFFFFFFU, begin, owner), __shfl_sync(0xFFFFFFFFU, end, owner), lane, kWarpThreads);
      }
      if (__any_sync(0xFFFFFFFFU, begin >= last)) {
        break;
      }
    }
  }
  ptx::bulk_wait_read<0>();
}

}  // namespace zipvl::cuda::attn::sm90
