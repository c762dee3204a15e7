// The pass of ranged attention within a window: every query, in token order, against the few keys before it.
//
// A tile of such rows is short, three blocks of 64 keys within a window of 128: its beginning and end weigh as much as
// its steps. Three consumer warpgroups, each with 64 rows, share the tile's keys but not its steps: each visits the
// blocks that its own rows see and hands on the others, so that they are at different steps and fill each other's
// waits. Queries come and outputs go by the copy engine: their rows are adjacent tokens. The launch admits kSinkRows
// sinks at most, because a consumer hands on keys before it takes sinks.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/pipeline.cuh"
#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sparse_attn/sm90/params.h"
#include "cuda/sparse_attn/sm90/scheduler.cuh"
#include "cuda/sparse_attn/sm90/sinks.cuh"
#include "cuda/sparse_attn/sm90/softmax.cuh"
#include "cuda/sparse_attn/sm90/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

template <typename ElementType, int HeadDim>
struct WindowTraits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kConsumers = 3;
  static constexpr int kRows = 64;  // of a consumer
  static constexpr int kBlockM = kRows * kConsumers;
  // Scores, weights and output of a 64 x 64 tile take 112 registers at D 128; the queries stay in shared memory.
  static constexpr int kBlockN = 64;
  static constexpr int kStages = 3;       // of K and of V
  static constexpr int kQueryStages = 2;  // the outputs of a tile leave from where its queries were
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
  static constexpr int kProducerRegisters = HeadDim == 64 ? 56 : 32;
  static constexpr int kConsumerRegisters = HeadDim == 64 ? 152 : 160;  // 56 + 3 * 152 = 32 + 3 * 160 = 512

  using Queries = Sw128Slabs<kBlockM, HeadDim>;  // and outputs
  using Keys = Sw128Slabs<kBlockN, HeadDim>;     // and values
};

// How the copy engine moves queries, the tile's, and outputs, a consumer's, besides what it reads of the keys.
struct WindowMaps {
  RangedMaps keys;
  CUtensorMap q, out;
};

template <typename Traits>
struct WindowStorage {
  static constexpr int kGroups = Traits::kBlockM / kRowGroup;
  alignas(1024) typename Traits::Element q[Traits::kQueryStages][Traits::Queries::kElements];
  alignas(1024) typename Traits::Element k[Traits::kStages][Traits::Keys::kElements];
  alignas(1024) typename Traits::Element v[Traits::kStages][Traits::Keys::kElements];
  SinkStorage<Traits> sinks;
  // What the rows of a tile see, a stage like its queries.
  alignas(16) int4 group[Traits::kQueryStages][kGroups];  // RowRanges::group
  int2 range[Traits::kQueryStages][Traits::kBlockM];
  Tile tile[Traits::kQueryStages];  // batch -1: there are no more
  std::uint64_t q_full[Traits::kQueryStages], q_empty[Traits::kQueryStages];
  std::uint64_t rows_full[Traits::kQueryStages], rows_empty[Traits::kQueryStages];
  std::uint64_t k_full[Traits::kStages], k_empty[Traits::kStages];
  std::uint64_t v_full[Traits::kStages], v_empty[Traits::kStages];
  TileTable table;
};

constexpr int kRangeWarps = 2;  // of the producer's four

template <typename Traits>
__device__ __forceinline__ void init_barriers(WindowStorage<Traits>& shared) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupThreads / kWarpThreads;
  for (int i = 0; i < Traits::kQueryStages; ++i) {
    ptx::mbarrier_init(&shared.q_full[i], 1);
    ptx::mbarrier_init(&shared.q_empty[i], Traits::kConsumers);
    // Every thread arrives, once a tile: each hands on what it has written or read itself.
    ptx::mbarrier_init(&shared.rows_full[i], kRangeWarps * kWarpThreads);
    ptx::mbarrier_init(&shared.rows_empty[i], kConsumerWarps * kWarpThreads + 1);  // one loads keys
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    for (std::uint64_t* full : {shared.k_full, shared.v_full}) {
      ptx::mbarrier_init(&full[i], 1);
    }
    for (std::uint64_t* empty : {shared.k_empty, shared.v_empty}) {
      ptx::mbarrier_init(&empty[i], kConsumerWarps);
    }
  }
  ptx::mbarrier_init(&shared.sinks.full, 1);
  ptx::mbarrier_init(&shared.sinks.empty, kConsumerWarps);
  ptx::fence_barrier_init();
}

// ---- the producer

// One thread: sinks, and blocks of keys from the last to the first; values follow one block behind, as they are used.
template <typename Traits>
__device__ __forceinline__ void load_window_keys(const AttnParams& params, const RangedMaps& maps,
                                                 WindowStorage<Traits>& shared) {
  using Keys = typename Traits::Keys;
  PipelineState<Traits::kStages> k_place, v_place;
  PipelineState<Traits::kQueryStages> rows;
  std::uint32_t sinks_phase = 0;
  const auto load = [](const CUtensorMap* map, typename Traits::Element* target, std::uint64_t* full,
                       std::uint64_t* empty, PipelineState<Traits::kStages>& place, int row, int head, int batch) {
    ptx::mbarrier_wait(&empty[place.index], place.phase ^ 1);
    ptx::mbarrier_arrive_expect_tx(&full[place.index], Keys::kBytes);
#pragma unroll 1
    for (int slab = 0; slab < Keys::kSlabs; ++slab) {
      ptx::tma_load_4d(target + place.index * Keys::kElements + slab * Keys::kSlabElements, map, &full[place.index],
                       slab * kSlabColumns, row, head, batch);
    }
    place.advance();
  };
  while (true) {
    ptx::mbarrier_wait(&shared.rows_full[rows.index], rows.phase);
    const Tile tile = shared.tile[rows.index];
    if (tile.batch < 0) {
      return;
    }
    const TileBlocks blocks = tile_blocks<Traits>(params, [&](int i) { return shared.group[rows.index][i]; });
    ptx::mbarrier_arrive(&shared.rows_empty[rows.index]);
    rows.advance();
    const int head = tile.head / params.group;
    if (blocks.sinks) {
      load_sinks<Traits>(params, maps, shared.sinks, head, tile.batch, sinks_phase);
    }
    const int count = blocks.end - blocks.first;
    for (int i = 0; i <= count && count > 0; ++i) {
      if (i < count) {
        load(&maps.k, shared.k[0], shared.k_full, shared.k_empty, k_place, (blocks.end - 1 - i) * Traits::kBlockN, head,
             tile.batch);
      }
      if (i > 0) {
        load(&maps.v, shared.v[0], shared.v_full, shared.v_empty, v_place, (blocks.end - i) * Traits::kBlockN, head,
             tile.batch);
      }
    }
  }
}

// One thread: the queries of every tile.
template <typename Traits>
__device__ __forceinline__ void load_window_queries(const AttnParams& params, const CUtensorMap& q_map,
                                                    WindowStorage<Traits>& shared) {
  using Queries = typename Traits::Queries;
  PipelineState<Traits::kQueryStages> place;
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    ptx::mbarrier_wait(&shared.q_empty[place.index], place.phase ^ place.index ^ 1);  // release_outputs
    ptx::mbarrier_arrive_expect_tx(&shared.q_full[place.index], Queries::kBytes);
#pragma unroll 1
    for (int slab = 0; slab < Queries::kSlabs; ++slab) {
      ptx::tma_load_4d(shared.q[place.index] + slab * Queries::kSlabElements, &q_map, &shared.q_full[place.index],
                       slab * kSlabColumns, tile.block * Traits::kBlockM, tile.head, tile.batch);
    }
    place.advance();
  }
}

// kRangeWarps warps, of which this is thread `thread`: what the rows of every tile see.
template <typename Traits>
__device__ __forceinline__ void load_window_ranges(const AttnParams& params, WindowStorage<Traits>& shared,
                                                   int thread) {
  PipelineState<Traits::kQueryStages> place;
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    const int2* from = params.ranges.range + static_cast<std::int64_t>(tile.batch) * params.tokens;
    ptx::mbarrier_wait(&shared.rows_empty[place.index], place.phase ^ 1);
    if (thread < WindowStorage<Traits>::kGroups) {
      shared.group[place.index][thread] = load_group<Traits>(params, tile, thread);
      shared.tile[place.index] = tile;
    }
#pragma unroll 1
    for (int row = thread; row < Traits::kBlockM; row += kRangeWarps * kWarpThreads) {
      const int query = tile.block * Traits::kBlockM + row;
      shared.range[place.index][row] = query < params.tokens ? __ldcg(from + query) : make_int2(0, 0);
    }
    ptx::mbarrier_arrive(&shared.rows_full[place.index]);
    place.advance();
  }
  ptx::mbarrier_wait(&shared.rows_empty[place.index], place.phase ^ 1);
  if (thread == 0) {
    shared.tile[place.index].batch = -1;
  }
  ptx::mbarrier_arrive(&shared.rows_full[place.index]);
}

// ---- a consumer

template <typename Traits>
class WindowConsumer {
  using Element = typename Traits::Element;
  using QueryLayout = typename Traits::Queries;
  using KeyLayout = typename Traits::Keys;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kScores = kBlockN / 2;
  static constexpr int kOutputs = Traits::kHeadDim / 2;
  static constexpr int kFragments = Traits::kHeadDim / 16;
  using Stage = PipelineState<Traits::kStages>;

 public:
  __device__ __forceinline__ WindowConsumer(const AttnParams& params, const CUtensorMap& out_map,
                                            WindowStorage<Traits>& shared, int warpgroup)
      : params_(params), out_map_(out_map), shared_(shared), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    while (true) {
      ptx::mbarrier_wait(&shared_.rows_full[place_.index], place_.phase);
      if (shared_.tile[place_.index].batch < 0) {
        break;
      }
      attend();
      place_.advance();
    }
    if (is_first_thread()) {
      ptx::tma_store_wait<0>();  // they read shared memory
    }
  }

 private:
  __device__ __forceinline__ void attend() {
    const Blocks blocks = own_blocks();
    const int2* range = shared_.range[place_.index] + row();
    RowState rows;
    rows.max[0] = rows.max[1] = -INFINITY;
    rows.sum[0] = rows.sum[1] = 0.0F;
    float o[kOutputs], s[kScores];
    std::uint32_t p[kScores / 8][4];
    float rescale[2];
#pragma unroll
    for (float& x : o) {
      x = 0.0F;
    }
    pass_on(blocks.above);
    ptx::mbarrier_wait(&shared_.q_full[place_.index], place_.phase);
    if (blocks.sinks) {
      const int seen[2] = {min(range[0].x, params_.ranges.num_sinks), min(range[8].x, params_.ranges.num_sinks)};
      const std::uint64_t query = queries();
      for (int sink = 0; sink < params_.ranges.num_sinks; sink += kSinkRows) {
        attend_sinks<Traits>(o, rows, shared_.sinks, sinks_phase_, params_.scale_log2, seen, sink,
                             [&](float (&scores)[kSinkRows / 2], std::uint64_t key, int k) {
                               ptx::Wgmma<Element, kSinkRows, false>::ss(
                                   scores, ptx::wgmma_advance(query, QueryLayout::column_step(k)), key, k > 0);
                             });
      }
    }
    if (blocks.first < blocks.end) {
      int block = blocks.end - 1;
      ptx::mbarrier_wait(&shared_.k_full[k_.index], k_.phase);
      ptx::warpgroup_fence_operand(s);
      ptx::warpgroup_arrive();
      issue_qk(s);
      ptx::warpgroup_commit_batch();
      release_outputs();
      ptx::warpgroup_wait<0>();
      ptx::warpgroup_fence_operand(s);
      arrive(&shared_.k_empty[k_.index]);
      k_.advance();
      weigh(s, rows, rescale, range, block);
      rescale_o(o, rescale);  // by the sinks' weights
      to_fragments<Element>(s, p);
      while (--block >= blocks.first) {
        ptx::mbarrier_wait(&shared_.k_full[k_.index], k_.phase);
        await_values();
        ptx::warpgroup_fence_operand(s);
        ptx::warpgroup_fence_operand(o);
        ptx::warpgroup_arrive();
        issue_qk(s);
        ptx::warpgroup_commit_batch();
        ptx::warpgroup_arrive();
        issue_pv(o, p);
        ptx::warpgroup_commit_batch();
        ptx::warpgroup_wait<1>();
        ptx::warpgroup_fence_operand(s);
        arrive(&shared_.k_empty[k_.index]);
        weigh(s, rows, rescale, range, block);
        ptx::warpgroup_fence_operand(s);
        ptx::warpgroup_wait<0>();
        ptx::warpgroup_fence_operand(o);
        release_values();
        k_.advance();
        rescale_o(o, rescale);
        to_fragments<Element>(s, p);
      }
      await_values();
      ptx::warpgroup_fence_operand(o);
      ptx::warpgroup_arrive();
      issue_pv(o, p);
      ptx::warpgroup_commit_batch();
      ptx::warpgroup_wait<0>();
      ptx::warpgroup_fence_operand(o);
      release_values();
    } else {
      release_outputs();
    }
    pass_on(own_blocks().below);  // read again: it would take registers
    store(o, rows);
    ptx::mbarrier_arrive(&shared_.rows_empty[place_.index]);
  }

  // What RowRanges::group says of the first and the last 32 of this consumer's rows.
  __device__ __forceinline__ int4 group(int half) const { return shared_.group[place_.index][2 * warpgroup_ + half]; }

  // The blocks that this consumer's rows see, [first, end); how many others of the tile are above and below them; and
  // whether rows may see sinks.
  struct Blocks {
    int first, end, above, below;
    bool sinks;
  };
  __device__ __forceinline__ Blocks own_blocks() const {
    const TileBlocks all = tile_blocks<Traits>(params_, [&](int i) { return shared_.group[place_.index][i]; });
    const int4 low = group(0), high = group(1);
    int first = min(low.x, high.x) / kBlockN, end = (max(low.y, high.y) + kBlockN - 1) / kBlockN;
    if (first >= end) {
      first = end = all.end;
    }
    return {first, end, all.end - end, first - all.first, all.sinks};
  }

  // Blocks that this consumer's rows do not see.
  __device__ __forceinline__ void pass_on(int blocks) {
    for (int i = 0; i < blocks; ++i) {
      ptx::mbarrier_wait(&shared_.k_full[k_.index], k_.phase);
      arrive(&shared_.k_empty[k_.index]);
      k_.advance();
      await_values();
      release_values();
    }
  }

  // Scores of `block` -> weights.
  __device__ __forceinline__ void weigh(float (&s)[kScores], RowState& rows, float (&rescale)[2], const int2* range,
                                        int block) const {
    const int4 low = group(0), high = group(1);
    const bool all_see = block * kBlockN >= max(low.z, high.z) && (block + 1) * kBlockN <= min(low.w, high.w);
    if (!all_see) {
      const int2 of_rows[2] = {range[0], range[8]};
      const int begin[2] = {of_rows[0].x, of_rows[1].x}, limit[2] = {of_rows[0].y, of_rows[1].y};
      online_softmax<true>(s, rows, rescale, params_.scale_log2, RowLimits<true>{begin, limit}, block * kBlockN);
    } else {
      const int none[2] = {0, 0};
      online_softmax<false>(s, rows, rescale, params_.scale_log2, RowLimits<true>{none, none}, 0);
    }
  }

  // The thread in its warpgroup; what is derived from it is made at its use, as registers are short.
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x) % kWarpgroupThreads; }

  // The first row of the thread in the tile; the other is 8 after it.
  __device__ __forceinline__ int row() const {
    const int own = thread();
    return warpgroup_ * Traits::kRows + own / kWarpThreads * 16 + own % kWarpThreads / 4;
  }

  // Outputs and their log-sum-exp. Outputs go where the queries were: those of the tile's last row block as well, whose
  // rows past the end the copy engine leaves out.
  __device__ __forceinline__ void store(const float (&o)[kOutputs], const RowState& rows) {
    const Tile tile = shared_.tile[place_.index];
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = tile.block * Traits::kBlockM + row() + 8 * i;
      float* lse = params_.ranges.lse;
      if (lse != nullptr) {
        lse = query < params_.tokens
                  ? lse + (static_cast<std::int64_t>(tile.batch) * params_.query_heads + tile.head) * params_.tokens +
                        query
                  : nullptr;
      }
      inverse[i] = merge_row<false>(rows, i, params_.scale_log2, lse).inverse;
    }
    sync();  // the products of all four warps have read the queries
    const int lane = thread() % kWarpThreads;
    const int stored_row = row() - lane / 4 + lane % 8 + 8 * (lane / 8 % 2);  // of the matrix row that this lane names
    const std::uint32_t to = ptx::shared_address(shared_.q[place_.index]) + QueryLayout::row(stored_row);
#pragma unroll
    for (int piece = 0; piece < Traits::kHeadDim / kPieceElements; piece += 2) {
      std::uint32_t x[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int i = m % 2, at = 4 * (piece + m / 2) + 2 * i;
        x[m] = pack_pair<Element>(o[at] * inverse[i], o[at + 1] * inverse[i]);
      }
      const int own = piece + lane / 16;
      ptx::stmatrix(to + QueryLayout::slab_of(piece) + QueryLayout::in_row(stored_row, own), x);
    }
    ptx::fence_view_async_shared();
    sync();
    if (is_first_thread()) {
      for (int slab = 0; slab < QueryLayout::kSlabs; ++slab) {
        ptx::tma_store_4d(&out_map_,
                          shared_.q[place_.index] + slab * QueryLayout::kSlabElements +
                              QueryLayout::row_elements(warpgroup_ * Traits::kRows),
                          slab * kSlabColumns, tile.block * Traits::kBlockM + warpgroup_ * Traits::kRows, tile.head,
                          tile.batch);
      }
      ptx::tma_store_arrive();
    }
  }

  // The place of the last tile's outputs takes queries again, once the copy engine has read them. The first tile
  // releases the second stage, which nothing has left yet.
  __device__ __forceinline__ void release_outputs() {
    if (is_first_thread()) {
      ptx::tma_store_wait<0>();
      ptx::mbarrier_arrive(&shared_.q_empty[place_.index ^ 1]);
    }
  }
  static_assert(Traits::kQueryStages == 2);

  // The descriptor of this consumer's rows, made at each use: registers are short.
  __device__ __forceinline__ std::uint64_t queries() const {
    return ptx::wgmma_descriptor(shared_.q[ptx::opaque(place_.index)] +
                                 QueryLayout::row_elements(warpgroup_ * Traits::kRows));
  }

  __device__ __forceinline__ void issue_qk(float (&s)[kScores]) const {
    const std::uint64_t query = queries(), key = ptx::wgmma_descriptor(shared_.k[k_.index]);
#pragma unroll
    for (int k = 0; k < kFragments; ++k) {
      ptx::Wgmma<Element, kBlockN, false>::ss(s, ptx::wgmma_advance(query, QueryLayout::column_step(k)),
                                              ptx::wgmma_advance(key, KeyLayout::column_step(k)), k > 0);
    }
  }

  __device__ __forceinline__ void issue_pv(float (&o)[kOutputs], const std::uint32_t (&p)[kScores / 8][4]) const {
    const std::uint64_t value =
        ptx::wgmma_descriptor(shared_.v[values()], KeyLayout::kGroupBytes, KeyLayout::kSlabBytes);
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      ptx::Wgmma<Element, Traits::kHeadDim, true>::rs(o, p[k], ptx::wgmma_advance(value, KeyLayout::row_step(k)), 1);
    }
  }

  __device__ __forceinline__ static bool is_first_thread() { return thread() == 0; }

  // The warp's arrival, once all its lanes have waited for what they release.
  __device__ __forceinline__ static void arrive(std::uint64_t* barrier) {
    __syncwarp();
    if (thread() % kWarpThreads == 0) {
      ptx::mbarrier_arrive(barrier);
    }
  }

  __device__ __forceinline__ int values() const { return k_.index == 0 ? Traits::kStages - 1 : k_.index - 1; }
  __device__ __forceinline__ void await_values() const {
    ptx::mbarrier_wait(&shared_.v_full[values()], k_.index == 0 ? k_.phase ^ 1 : k_.phase);
  }
  __device__ __forceinline__ void release_values() const { arrive(&shared_.v_empty[values()]); }

  // All of this warpgroup. Barrier 0 is __syncthreads.
  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(1 + warpgroup_, kWarpgroupThreads); }

  const AttnParams& params_;
  const CUtensorMap& out_map_;
  WindowStorage<Traits>& shared_;
  int warpgroup_;
  Stage k_;  // of the next keys; the next values are those of the keys before them
  PipelineState<Traits::kQueryStages> place_;
  std::uint32_t sinks_phase_ = 0;
};

// What it reads was written by kernels before it, the last of which it waits for.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    window_attn_sm90(const __grid_constant__ AttnParams params, const __grid_constant__ WindowMaps maps) {
  extern __shared__ unsigned char shared_bytes[];
  auto& shared =
      *reinterpret_cast<WindowStorage<Traits>*>((reinterpret_cast<std::uintptr_t>(shared_bytes) + 1023) / 1024 * 1024);
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  if (threadIdx.x == 0) {
    init_barriers(shared);
    for (const CUtensorMap* map :
         {&maps.keys.k, &maps.keys.v, &maps.keys.sink_k, &maps.keys.sink_v, &maps.q, &maps.out}) {
      ptx::tma_prefetch(map);
    }
  }
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();
  if (warp == 1) {
    make_tile_table<Traits::kBlockM, true>(params, shared.table, 0, lane);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0 && lane == 0) {
      load_window_keys(params, maps.keys, shared);
    } else if (warp == 1 && lane == 0) {
      load_window_queries(params, maps.q, shared);
    } else if (warp >= 2) {
      load_window_ranges(params, shared, static_cast<int>(threadIdx.x) - 2 * kWarpThreads);
    }
  } else {
    ptx::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    // Through lane 0, so that the compiler knows it to be the same in the whole warp: addresses of operands depend on
    // it.
    WindowConsumer<Traits>(params, maps.out, shared, __shfl_sync(kAllLanes, warp / 4 - 1, 0)).run();
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm90
