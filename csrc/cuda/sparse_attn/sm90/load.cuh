// The producer warpgroup: K and V tiles by the copy engine, query rows gathered with cp.async, and zeros written to
// rows that nobody selected.
#pragma once

#include <cuda.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sparse_attn/sm90/scheduler.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

// One thread. Keys of a tile go from the last block to the first; values follow one block behind, as they are used.
template <typename Traits>
__device__ __forceinline__ void load_keys_values(const AttnParams& params, const CUtensorMap* k_map,
                                                 const CUtensorMap* v_map, SharedStorage<Traits>& shared) {
  using Keys = typename Traits::Keys;
  constexpr int kBlockN = Traits::kBlockN;
  StageParity k_parity, v_parity;
  ptx::wait_on_dependent_grids();  // it packs what is loaded here
  const auto load = [&](const CUtensorMap* map, typename Traits::Element* target, std::uint64_t* full,
                        std::uint64_t* empty, StageParity& parity, int stage, const Tile& tile, int block) {
    ptx::mbarrier_wait(&empty[stage], parity.of(stage) ^ 1);
    ptx::mbarrier_arrive_expect_tx(&full[stage], Keys::kBytes);
#pragma unroll
    for (int slab = 0; slab < Keys::kSlabs; ++slab) {
      ptx::tma_load_4d(target + stage * Keys::kElements + slab * Keys::kSlabElements, map, &full[stage],
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
// past the end repeat row 0, which another block may be writing where `out` is q, and are never stored.
template <typename Traits>
__device__ __forceinline__ void load_queries(const AttnParams& params, SharedStorage<Traits>& shared, int warp,
                                             int lane) {
  constexpr int kRows = Traits::kBlockM / kQueryWarps;  // of this warp
  using Queries = typename Traits::Queries;
  constexpr int kPieces = Queries::kPieces;
  constexpr int kRowsAtOnce = kWarpThreads / (kPieces < 32 ? kPieces : 32);
  constexpr int kRowsAhead = Traits::kProducerRegisters < 40 ? 1 : 4;  // addresses of more would spill
  static_assert(kPieces <= kWarpThreads && kRows % kWarpThreads == 0);
  const int piece = lane % kPieces, row_of_lane = lane / kPieces;
  const bool inside = piece * kPieceElements < Traits::kHeadDim;
  PipelineState<Traits::kQueryStages> place;
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
        position[i] =
            params.all_queries ? row : min(max(__ldcg(index + row * params.index_stride[1]), 0), params.tokens - 1);
      }
    }
    ptx::mbarrier_wait(&shared.q_empty[place.index], place.phase ^ 1);
    const std::uint32_t target = ptx::shared_address(shared.q[place.index]) + Queries::slab_of(piece);
#pragma unroll
    for (int i = 0; i < kRows / kWarpThreads; ++i) {
#pragma unroll kRowsAhead
      for (int step = 0; step < kWarpThreads; step += kRowsAtOnce) {
        const int row = warp * kRows + i * kWarpThreads + step + row_of_lane;
        const int from = __shfl_sync(kAllLanes, position[i], step + row_of_lane);
        if (inside) {
          ptx::cp_async_16(target + Queries::row(row) + Queries::in_row(row, piece), q + from * params.q_stride[2]);
        }
      }
    }
    ptx::cp_async_mbarrier_arrive_noinc(&shared.q_full[place.index]);
    place.advance();
  }
}

// How many of the first `count` places hold a token before `token`, for the whole warp: 32 probes a round.
__device__ __forceinline__ int places_before(const std::int32_t* index, std::int64_t stride, int count, int token,
                                             int lane) {
  int low = 0, high = count;
  while (low < high) {
    const int step = (high - low + kWarpThreads - 1) / kWarpThreads;
    const int probe = low + lane * step + step - 1;
    const bool before = probe < high && __ldcg(index + probe * stride) < token;
    low += __popc(__ballot_sync(kAllLanes, before)) * step;
    high = min(low + step - 1, high);
  }
  return low;
}

// One warp: the zeros of its block's share of the tokens, 32 at a time, a lane a token. The copy engine writes them
// from a piece of shared zeros while the tensor cores work.
template <typename Traits>
__device__ __forceinline__ void write_zeros(const AttnParams& params, SharedStorage<Traits>& shared, int lane) {
  for (int i = lane; i < kZeroBytes / 16; i += kWarpThreads) {
    reinterpret_cast<uint4*>(shared.zeros)[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_view_async_shared();
  __syncwarp();
  const auto share_begin = [&](unsigned block) {
    return static_cast<int>(static_cast<std::int64_t>(params.tokens) * block / gridDim.x);
  };
  const int begin = share_begin(blockIdx.x), end = share_begin(blockIdx.x + 1);
  for (int b = 0; b < params.batch; ++b) {
    const int count = selected(params, b);
    const std::int32_t* index = params.index + b * params.index_stride[0];
    unsigned char* rows = params.zeros + b * params.tokens * params.zero_row_bytes;
    int place = places_before(index, params.index_stride[1], count, begin, lane);
    for (int first = begin; first < end; first += kWarpThreads) {
      // At most 32 places name one of these tokens, and they follow each other.
      const bool there = place + lane < count;
      const int token = there ? __ldcg(index + (place + lane) * params.index_stride[1]) : 0;
      const bool passed = there && token < first + kWarpThreads;
      const unsigned named = passed && token >= first ? 1U << (token - first) : 0;
      const unsigned selected_here = __reduce_or_sync(kAllLanes, named);
      place += __popc(__ballot_sync(kAllLanes, passed));
      if (first + lane < end && (selected_here >> lane & 1) == 0) {
        unsigned char* at = rows + (first + lane) * params.zero_row_bytes;
        for (std::int64_t left = params.zero_row_bytes; left > 0; at += kZeroBytes, left -= kZeroBytes) {
          ptx::bulk_store(at, shared.zeros, left < kZeroBytes ? static_cast<std::uint32_t>(left) : kZeroBytes);
        }
        ptx::tma_store_arrive();
        ptx::tma_store_wait<4>();
      }
    }
  }
  ptx::tma_store_wait<0>();
}

}  // namespace zipvl::cuda::sparse_attn::sm90
