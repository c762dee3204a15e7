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
#include "cuda/sparse_attn/sm90/sinks.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

// Blocks [first, end) of a tile's keys from the last to the first; values follow one block behind, as they are used.
template <typename Traits>
__device__ __forceinline__ void load_blocks(const AttnParams& params, const CUtensorMap* k_map,
                                            const CUtensorMap* v_map, SharedStorage<Traits>& shared, const Tile& tile,
                                            int first, int end, StageParity& k_parity, StageParity& v_parity) {
  using Keys = typename Traits::Keys;
  const auto load = [&](const CUtensorMap* map, typename Traits::Element* target, std::uint64_t* full,
                        std::uint64_t* empty, StageParity& parity, int stage, int block) {
    ptx::mbarrier_wait(&empty[stage], parity.of(stage) ^ 1);
    ptx::mbarrier_arrive_expect_tx(&full[stage], Keys::kBytes);
#pragma unroll
    for (int slab = 0; slab < Keys::kSlabs; ++slab) {
      ptx::tma_load_4d(target + stage * Keys::kElements + slab * Keys::kSlabElements, map, &full[stage],
                       slab * kSlabColumns, block * Traits::kBlockN, tile.head / params.group, tile.batch);
    }
    parity.flip(stage);
  };
  const int blocks = end - first;
  for (int i = 0; i <= blocks && blocks > 0; ++i) {
    if (i < blocks) {
      load(k_map, shared.k[0], shared.k_full, shared.k_empty, k_parity, i % 2, end - 1 - i);
    }
    if (i > 0) {
      load(v_map, shared.v[0], shared.v_full, shared.v_empty, v_parity, (i - 1) % 2, end - i);
    }
  }
}

// One thread.
template <typename Traits>
__device__ __forceinline__ void load_keys_values(const AttnParams& params, const CUtensorMap* k_map,
                                                 const CUtensorMap* v_map, SharedStorage<Traits>& shared) {
  StageParity k_parity, v_parity;
  ptx::wait_on_dependent_grids();  // it packs what is loaded here
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    const int blocks = (keys_seen<Traits::kBlockM>(params, tile, 0).last + Traits::kBlockN - 1) / Traits::kBlockN;
    load_blocks(params, k_map, v_map, shared, tile, 0, blocks, k_parity, v_parity);
  }
}

// The same of ranged attention. Sinks come before the blocks, 16 at a time.
template <typename Traits>
__device__ __forceinline__ void load_ranged_keys_values(const AttnParams& params, const RangedMaps& maps,
                                                        SharedStorage<Traits>& shared) {
  StageParity k_parity, v_parity;
  std::uint32_t sinks_phase = 0;
  PipelineState<Traits::kQueryStages> place;
  while (true) {
    ptx::mbarrier_wait(&shared.ranged.rows_full[place.index], place.phase);
    const Tile tile = shared.ranged.tile[place.index];
    if (tile.batch < 0) {
      return;
    }
    const TileBlocks blocks = tile_blocks<Traits>(params, [&](int i) { return shared.ranged.group[place.index][i]; });
    ptx::mbarrier_arrive(&shared.ranged.rows_empty[place.index]);
    place.advance();
    if (blocks.sinks) {
      load_sinks<Traits>(params, maps, shared.ranged.sinks, tile.head / params.group, tile.batch, sinks_phase);
    }
    load_blocks(params, &maps.k, &maps.v, shared, tile, blocks.first, blocks.end, k_parity, v_parity);
  }
}

// Ranged attention: the queries of a warp's rows, and in shared memory what they see.
template <typename Traits, int kEach>
__device__ __forceinline__ void load_row_ranges(const AttnParams& params, SharedStorage<Traits>& shared,
                                                const Tile& tile, int rows, int warp, int lane,
                                                const PipelineState<Traits::kQueryStages>& place,
                                                int (&position)[kEach]) {
  const RowRanges& from = params.ranges;
  const std::int64_t batch = static_cast<std::int64_t>(tile.batch) * params.tokens;
  int2 range[kEach];
  int4 group = make_int4(0, 0, 0, 0);
  const bool has_group = warp == 0 && lane < Traits::kBlockM / kRowGroup;
  if (has_group) {
    group = load_group<Traits>(params, tile, lane);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = tile.block * Traits::kBlockM + (warp * kEach + i) * kWarpThreads + lane;
    position[i] = -1;
    range[i] = make_int2(0, 0);
    if (row < rows) {
      position[i] = from.query == nullptr ? row : min(max(__ldcg(from.query + batch + row), 0), params.tokens - 1);
      range[i] = __ldcg(from.range + batch + row);
    }
  }
  ptx::mbarrier_wait(&shared.ranged.rows_empty[place.index], place.phase ^ 1);
  if (has_group) {
    shared.ranged.group[place.index][lane] = group;
    shared.ranged.tile[place.index] = tile;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int row = (warp * kEach + i) * kWarpThreads + lane;
    shared.ranged.range[place.index][row] = range[i];
    shared.ranged.row[place.index][row] = position[i] < 0 ? -1 : static_cast<int>(batch) + position[i];
    position[i] = max(position[i], 0);
  }
  ptx::mbarrier_arrive(&shared.ranged.rows_full[place.index]);
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
  // Addresses of more would spill.
  constexpr int kRowsAhead = Traits::kProducerRegisters < 40 || Traits::kRanged ? 1 : 4;
  static_assert(kPieces <= kWarpThreads && kRows % kWarpThreads == 0);
  const int piece = lane % kPieces, row_of_lane = lane / kPieces;
  const bool inside = piece * kPieceElements < Traits::kHeadDim;
  PipelineState<Traits::kQueryStages> place;
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    const int rows = query_rows<Traits::kRanged>(params, tile.batch);
    [[maybe_unused]] const std::int32_t* index = params.index + tile.batch * params.index_stride[0];
    const auto* q = static_cast<const typename Traits::Element*>(params.q) + tile.batch * params.q_stride[0] +
                    tile.head * params.q_stride[1] + piece * kPieceElements;
    int position[kRows / kWarpThreads];
    if constexpr (Traits::kRanged) {
      load_row_ranges(params, shared, tile, rows, warp, lane, place, position);
    } else {
#pragma unroll
      for (int i = 0; i < kRows / kWarpThreads; ++i) {
        const int row = tile.block * Traits::kBlockM + warp * kRows + i * kWarpThreads + lane;
        position[i] = 0;
        if (row < rows) {
          position[i] =
              params.all_queries ? row : min(max(__ldcg(index + row * params.index_stride[1]), 0), params.tokens - 1);
        }
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
  if constexpr (Traits::kRanged) {  // there are no more tiles
    ptx::mbarrier_wait(&shared.ranged.rows_empty[place.index], place.phase ^ 1);
    if (warp == 0 && lane == 0) {
      shared.ranged.tile[place.index].batch = -1;
    }
    ptx::mbarrier_arrive(&shared.ranged.rows_full[place.index]);
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
