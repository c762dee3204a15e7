// The pass of ranged attention within a window: every query, in token order, against the few keys before it.
//
// A tile's rows are those of all query heads of a key/value head, token by token: 27 tokens of 7 heads. So its rows see
// nearly the same keys, few more than the window. What bounds so short a tile is how long one step waits for the last.
// Three consumer warpgroups, each with 64 rows, share the keys, and none waits for another: they are at different steps
// and fill each other's waits. Queries come and outputs go by the copy engine. At most kSinkRows sinks: more would come
// in turns, and a consumer asks for the first keys of its next tile before its sinks.
#pragma once

#include <cuda.h>

#include <climits>
#include <cstdint>

#include "common/math.h"
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
  static constexpr int kStages = 3;       // of K and of V: within a window of 128 a tile's
  static constexpr int kQueryStages = 2;  // the outputs of a tile leave from where its queries were
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
  static constexpr int kProducerRegisters = HeadDim == 64 ? 56 : 32;
  static constexpr int kConsumerRegisters = HeadDim == 64 ? 152 : 160;  // 56 + 3 * 152 = 32 + 3 * 160 = 512

  using Queries = Sw128Slabs<kBlockM, HeadDim>;  // and outputs
  using Keys = Sw128Slabs<kBlockN, HeadDim>;     // and values
};

// How the copy engine moves a tile's queries and outputs, besides what it reads of the keys.
struct WindowMaps {
  RangedMaps keys;
  CUtensorMap q, out;
};

// Whole tokens of a tile: a row is query head `row % group` of token `row / group`. Rows past the last token are
// unused.
template <typename Traits>
ZIPVL_HOST_DEVICE int tokens_of_tile(int group) {
  return Traits::kBlockM / group;
}

// A block's tiles, every role by itself: tile.head is a key/value head.
template <typename Traits>
class WindowWalk {
 public:
  __device__ __forceinline__ explicit WindowWalk(const AttnParams& params)
      : kv_heads_(params.kv_heads),
        blocks_((params.tokens + tokens_of_tile<Traits>(params.group) - 1) / tokens_of_tile<Traits>(params.group)),
        tiles_(params.batch * kv_heads_ * blocks_),
        place_(static_cast<int>(blockIdx.x)) {}

  __device__ __forceinline__ bool valid() const { return place_ < tiles_; }
  __device__ __forceinline__ void next() { place_ += static_cast<int>(gridDim.x); }
  __device__ __forceinline__ Tile tile() const {
    const int row = place_ / kv_heads_;
    return {row / blocks_, place_ % kv_heads_, row % blocks_};
  }

 private:
  int kv_heads_, blocks_, tiles_, place_;
};

template <typename Traits>
struct WindowStorage {
  static constexpr int kGroups = Traits::kBlockM / kWarpThreads;
  alignas(1024) typename Traits::Element q[Traits::kQueryStages][Traits::Queries::kElements];
  alignas(1024) typename Traits::Element k[Traits::kStages][Traits::Keys::kElements];
  alignas(1024) typename Traits::Element v[Traits::kStages][Traits::Keys::kElements];
  SinkStorage<Traits> sinks;
  // What the rows of a tile see, a stage like its queries.
  alignas(16) int4 group[Traits::kQueryStages][kGroups];  // of 32 rows, as RowRanges::group
  int2 range[Traits::kQueryStages][Traits::kBlockM];
  Tile tile[Traits::kQueryStages];  // batch -1: there are no more
  std::uint64_t q_full[Traits::kQueryStages], out_full[Traits::kQueryStages];
  std::uint64_t rows_full[Traits::kQueryStages], rows_empty[Traits::kQueryStages];
  std::uint64_t k_full[Traits::kStages], k_empty[Traits::kStages];
  std::uint64_t v_full[Traits::kStages], v_empty[Traits::kStages];
};

constexpr int kRangeWarps = 2;  // of the producer's four

// Of a warp's rows, as RowRanges::group says it; `exists`: whether the lane's row does.
__device__ __forceinline__ int4 sum_up_rows(int2 range, bool exists) {
  const bool sees = range.x < range.y;
  return make_int4(__reduce_min_sync(kAllLanes, sees ? range.x : INT_MAX),
                   __reduce_max_sync(kAllLanes, sees ? range.y : 0), __reduce_max_sync(kAllLanes, exists ? range.x : 0),
                   __reduce_min_sync(kAllLanes, !exists ? INT_MAX
                                                : sees  ? range.y
                                                        : 0));
}

template <typename Traits>
__device__ __forceinline__ void init_barriers(WindowStorage<Traits>& shared) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupThreads / kWarpThreads;
  for (int i = 0; i < Traits::kQueryStages; ++i) {
    ptx::mbarrier_init(&shared.q_full[i], 1);
    ptx::mbarrier_init(&shared.out_full[i], kConsumerWarps);
    ptx::mbarrier_init(&shared.rows_full[i], kRangeWarps);
    ptx::mbarrier_init(&shared.rows_empty[i], kConsumerWarps + 1);  // and the thread that loads keys
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

// The keys that a tile's rows see, in blocks from `begin` on, and whether rows may see sinks.
struct WindowBlocks {
  int begin, count;
  bool sinks;
};
template <typename Traits>
__device__ __forceinline__ WindowBlocks window_blocks(const AttnParams& params, const WindowStorage<Traits>& shared,
                                                      int stage) {
  int begin = INT_MAX, end = 0, max_begin = 0;
#pragma unroll
  for (const int4& of_rows : shared.group[stage]) {
    begin = min(begin, of_rows.x);
    end = max(end, of_rows.y);
    max_begin = max(max_begin, of_rows.z);
  }
  const int count = begin < end ? (end - begin + Traits::kBlockN - 1) / Traits::kBlockN : 0;
  return {begin, count, params.ranges.num_sinks > 0 && max_begin > 0};
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
    const WindowBlocks blocks = window_blocks(params, shared, rows.index);
    ptx::mbarrier_arrive(&shared.rows_empty[rows.index]);
    rows.advance();
    if (blocks.sinks) {
      load_sinks<Traits>(params, maps, shared.sinks, tile.head, tile.batch, sinks_phase);
    }
    for (int i = blocks.count; i >= 0 && blocks.count > 0; --i) {
      const int row = blocks.begin + i * Traits::kBlockN;
      if (i > 0) {
        load(&maps.k, shared.k[0], shared.k_full, shared.k_empty, k_place, row - Traits::kBlockN, tile.head,
             tile.batch);
      }
      if (i < blocks.count) {
        load(&maps.v, shared.v[0], shared.v_full, shared.v_empty, v_place, row, tile.head, tile.batch);
      }
    }
  }
}

// One thread: the queries of every tile, and its outputs.
template <typename Traits>
__device__ __forceinline__ void move_window_rows(const AttnParams& params, const WindowMaps& maps,
                                                 WindowStorage<Traits>& shared) {
  using Queries = typename Traits::Queries;
  const int tokens = tokens_of_tile<Traits>(params.group);
  const auto load = [&](const WindowWalk<Traits>& walk, int stage) {
    const Tile tile = walk.tile();
    const int bytes = Queries::kSlabs * tokens * params.group * Queries::kRowBytes;
    ptx::mbarrier_arrive_expect_tx(&shared.q_full[stage], static_cast<std::uint32_t>(bytes));
#pragma unroll 1
    for (int slab = 0; slab < Queries::kSlabs; ++slab) {
      ptx::tma_load_4d(shared.q[stage] + slab * Queries::kSlabElements, &maps.q, &shared.q_full[stage],
                       slab * kSlabColumns, tile.head * params.group, tile.block * tokens, tile.batch);
    }
  };
  WindowWalk<Traits> ahead(params);  // kQueryStages tiles before the outputs
  for (int stage = 0; stage < Traits::kQueryStages && ahead.valid(); ++stage, ahead.next()) {
    load(ahead, stage);
  }
  PipelineState<Traits::kQueryStages> place;
  for (WindowWalk<Traits> walk(params); walk.valid(); walk.next()) {
    ptx::mbarrier_wait(&shared.out_full[place.index], place.phase);
    const Tile tile = walk.tile();
#pragma unroll 1
    for (int slab = 0; slab < Queries::kSlabs; ++slab) {
      ptx::tma_store_4d(&maps.out, shared.q[place.index] + slab * Queries::kSlabElements, slab * kSlabColumns,
                        tile.head * params.group, tile.block * tokens, tile.batch);
    }
    ptx::tma_store_arrive();
    ptx::tma_store_wait<0>();
    if (ahead.valid()) {
      load(ahead, place.index);
      ahead.next();
    }
    place.advance();
  }
}

// kRangeWarps warps, of which this is thread `thread`: what the rows of every tile see.
template <typename Traits>
__device__ __forceinline__ void load_window_ranges(const AttnParams& params, WindowStorage<Traits>& shared,
                                                   int thread) {
  constexpr int kThreads = kRangeWarps * kWarpThreads;
  const int tokens = tokens_of_tile<Traits>(params.group);
  PipelineState<Traits::kQueryStages> place;
  const auto arrive = [&] {
    __syncwarp();
    if (thread % kWarpThreads == 0) {
      ptx::mbarrier_arrive(&shared.rows_full[place.index]);
    }
  };
  for (WindowWalk<Traits> walk(params); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    ptx::mbarrier_wait(&shared.rows_empty[place.index], place.phase ^ 1);
    if (thread == 0) {
      shared.tile[place.index] = tile;
    }
#pragma unroll 1
    for (int row = thread; row < Traits::kBlockM; row += kThreads) {
      const int token = row / params.group, query = tile.block * tokens + token;
      const bool exists = token < tokens && query < params.tokens;
      int2 range = make_int2(0, 0);
      if (exists) {
        range = __ldcg(params.ranges.range + static_cast<std::int64_t>(tile.batch) * params.tokens + query);
      }
      shared.range[place.index][row] = range;
      const int4 group = sum_up_rows(range, exists);
      if (thread % kWarpThreads == 0) {
        shared.group[place.index][row / kWarpThreads] = group;
      }
    }
    arrive();
    place.advance();
  }
  ptx::mbarrier_wait(&shared.rows_empty[place.index], place.phase ^ 1);
  if (thread == 0) {
    shared.tile[place.index].batch = -1;
  }
  arrive();
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

  // The tile's first key; the blocks from there that this consumer's rows see, [first, end); and how many others are
  // above and below them.
  struct Blocks {
    int begin, first, end, above, below;
  };

 public:
  __device__ __forceinline__ WindowConsumer(const AttnParams& params, WindowStorage<Traits>& shared, int warpgroup)
      : params_(params), shared_(shared), warpgroup_(warpgroup) {}

  // The first scores of a tile are under way while the outputs of the one before it are finished and stored.
  __device__ __forceinline__ void run() {
    float o[kOutputs], s[kScores];
    std::uint32_t p[kScores / 8][4];
    float rescale[2];
    Blocks blocks;
    int none_held = -1;
    if (!begin_tile(place_, blocks, none_held)) {
      return;
    }
    issue_qk(s, place_.index);
    while (true) {
      const int2* range = shared_.range[place_.index] + row();
      RowState rows;
      rows.max[0] = rows.max[1] = -INFINITY;
      rows.sum[0] = rows.sum[1] = 0.0F;
#pragma unroll
      for (float& x : o) {
        x = 0.0F;
      }
      if (window_blocks(params_, shared_, place_.index).sinks) {  // read again: it would take a register
        const int seen[2] = {min(range[0].x, params_.ranges.num_sinks), min(range[8].x, params_.ranges.num_sinks)};
        const std::uint64_t query = queries(place_.index);
        attend_sinks<Traits>(o, rows, shared_.sinks, sinks_phase_, params_.scale_log2, seen, 0,
                             [&](float (&scores)[kSinkRows / 2], std::uint64_t key, int k) {
                               ptx::Wgmma<Element, kSinkRows, false>::ss(
                                   scores, ptx::wgmma_advance(query, QueryLayout::column_step(k)), key, k > 0);
                             });
      }
      ptx::warpgroup_wait<0>();
      ptx::warpgroup_fence_operand(s);
      const bool sees = blocks.first < blocks.end;
      if (sees) {
        int block = blocks.end - 1;
        arrive(&shared_.k_empty[k_.index]);
        k_.advance();
        weigh(s, rows, rescale, range, blocks.begin + block * kBlockN);
        rescale_o(o, rescale);  // by the sinks' weights
        to_fragments<Element>(s, p);
        while (--block >= blocks.first) {
          ptx::mbarrier_wait(&shared_.k_full[k_.index], k_.phase);
          await_values();
          ptx::warpgroup_fence_operand(o);
          issue_qk(s, place_.index);
          issue_pv(o, p);
          ptx::warpgroup_wait<1>();
          ptx::warpgroup_fence_operand(s);
          arrive(&shared_.k_empty[k_.index]);
          weigh(s, rows, rescale, range, blocks.begin + block * kBlockN);
          ptx::warpgroup_fence_operand(s);
          ptx::warpgroup_wait<0>();
          ptx::warpgroup_fence_operand(o);
          arrive(&shared_.v_empty[values()]);
          k_.advance();
          rescale_o(o, rescale);
          to_fragments<Element>(s, p);
        }
        await_values();
        ptx::warpgroup_fence_operand(o);
        issue_pv(o, p);
      }
      int held = sees ? values() : -1;  // the stage of the last values
      pass_on(own_blocks(place_.index).below, held);
      PipelineState<Traits::kQueryStages> next = place_;
      next.advance();
      const bool more = begin_tile(next, blocks, held);
      issue_qk(s, next.index);  // of no keys where there are none: nobody looks at them
      ptx::warpgroup_wait<1>();
      ptx::warpgroup_fence_operand(o);
      if (held >= 0) {
        arrive(&shared_.v_empty[held]);
      }
      store(o, rows);
      arrive(&shared_.rows_empty[place_.index]);
      if (!more) {
        ptx::warpgroup_wait<0>();
        return;
      }
      place_ = next;
    }
  }

 private:
  // Whether there is a tile at this place of the ring. Then its queries are there, and the first keys that this
  // consumer's rows see.
  __device__ __forceinline__ bool begin_tile(const PipelineState<Traits::kQueryStages>& place, Blocks& blocks,
                                             int& held) {
    ptx::mbarrier_wait(&shared_.rows_full[place.index], place.phase);
    if (shared_.tile[place.index].batch < 0) {
      return false;
    }
    blocks = own_blocks(place.index);
    pass_on(blocks.above, held);
    ptx::mbarrier_wait(&shared_.q_full[place.index], place.phase);
    if (blocks.first < blocks.end) {
      ptx::mbarrier_wait(&shared_.k_full[k_.index], k_.phase);
    }
    return true;
  }

  // What is summed up of the first and the last 32 of this consumer's rows.
  __device__ __forceinline__ int4 group(int stage, int half) const {
    return shared_.group[stage][2 * warpgroup_ + half];
  }

  __device__ __forceinline__ Blocks own_blocks(int stage) const {
    const WindowBlocks all = window_blocks(params_, shared_, stage);
    const int4 low = group(stage, 0), high = group(stage, 1);
    const int begin = min(low.x, high.x), end = max(low.y, high.y);
    if (begin >= end) {
      return {all.begin, all.count, all.count, 0, all.count};
    }
    const int first = (begin - all.begin) / kBlockN, last = (end - all.begin + kBlockN - 1) / kBlockN;
    return {all.begin, first, last, all.count - last, first};
  }

  // Blocks that this consumer's rows do not see. The stage of values that a product under way still holds (-1: none) is
  // released first: the ring may need it for theirs.
  __device__ __forceinline__ void pass_on(int blocks, int& held) {
    if (blocks > 0 && held >= 0) {
      ptx::warpgroup_wait<0>();
      arrive(&shared_.v_empty[held]);
      held = -1;
    }
    for (int i = 0; i < blocks; ++i) {
      ptx::mbarrier_wait(&shared_.k_full[k_.index], k_.phase);
      arrive(&shared_.k_empty[k_.index]);
      k_.advance();
      await_values();
      arrive(&shared_.v_empty[values()]);
    }
  }

  // Scores of a block of keys -> weights.
  __device__ __forceinline__ void weigh(float (&s)[kScores], RowState& rows, float (&rescale)[2], const int2* range,
                                        int first_key) const {
    const int4 low = group(place_.index, 0), high = group(place_.index, 1);
    const bool all_see = first_key >= max(low.z, high.z) && first_key + kBlockN <= min(low.w, high.w);
    if (!all_see) {
      const int2 of_rows[2] = {range[0], range[8]};
      const int begin[2] = {of_rows[0].x, of_rows[1].x}, limit[2] = {of_rows[0].y, of_rows[1].y};
      online_softmax<true>(s, rows, rescale, params_.scale_log2, RowLimits<true>{begin, limit}, first_key);
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

  // Outputs go where the queries were, and their log-sum-exp to device memory.
  __device__ __forceinline__ void store(const float (&o)[kOutputs], const RowState& rows) {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      inverse[i] = merge_row<false>(rows, i, params_.scale_log2, lse(row() + 8 * i)).inverse;
    }
    ptx::named_barrier_sync(1 + warpgroup_, kWarpgroupThreads);  // the products of all four warps have read the queries
    // Of the matrix row that this lane names. Made here: kept from tile to tile, what follows from it would spill.
    const int self = ptx::opaque(thread()), lane = self % kWarpThreads;
    const int stored_row = warpgroup_ * Traits::kRows + self / kWarpThreads * 16 + lane % 16;
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
    arrive(&shared_.out_full[place_.index]);
  }

  // Where the log-sum-exp of a row goes; null: nowhere.
  __device__ __forceinline__ float* lse(int row) const {
    const Tile tile = shared_.tile[place_.index];
    const int tokens = tokens_of_tile<Traits>(params_.group), token = row / params_.group;
    const int query = tile.block * tokens + token;
    if (params_.ranges.lse == nullptr || token >= tokens || query >= params_.tokens) {
      return nullptr;
    }
    const int head = tile.head * params_.group + row % params_.group;
    return params_.ranges.lse + (static_cast<std::int64_t>(tile.batch) * params_.query_heads + head) * params_.tokens +
           query;
  }

  // The descriptor of this consumer's rows, made at each use: registers are short.
  __device__ __forceinline__ std::uint64_t queries(int stage) const {
    return ptx::wgmma_descriptor(shared_.q[ptx::opaque(stage)] + QueryLayout::row_elements(warpgroup_ * Traits::kRows));
  }

  // A group of products each.
  __device__ __forceinline__ void issue_qk(float (&s)[kScores], int stage) const {
    const std::uint64_t query = queries(stage), key = ptx::wgmma_descriptor(shared_.k[k_.index]);
    ptx::warpgroup_fence_operand(s);
    ptx::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kFragments; ++k) {
      ptx::Wgmma<Element, kBlockN, false>::ss(s, ptx::wgmma_advance(query, QueryLayout::column_step(k)),
                                              ptx::wgmma_advance(key, KeyLayout::column_step(k)), k > 0);
    }
    ptx::warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_pv(float (&o)[kOutputs], const std::uint32_t (&p)[kScores / 8][4]) const {
    const std::uint64_t value =
        ptx::wgmma_descriptor(shared_.v[values()], KeyLayout::kGroupBytes, KeyLayout::kSlabBytes);
    ptx::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      ptx::Wgmma<Element, Traits::kHeadDim, true>::rs(o, p[k], ptx::wgmma_advance(value, KeyLayout::row_step(k)), 1);
    }
    ptx::warpgroup_commit_batch();
  }

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

  const AttnParams& params_;
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
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0 && lane == 0) {
      load_window_keys(params, maps.keys, shared);
    } else if (warp == 1 && lane == 0) {
      move_window_rows(params, maps, shared);
    } else if (warp >= 2) {
      load_window_ranges(params, shared, static_cast<int>(threadIdx.x) - 2 * kWarpThreads);
    }
  } else {
    ptx::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    // Through lane 0, so that the compiler knows it to be the same in the whole warp: addresses of operands depend on
    // it.
    WindowConsumer<Traits>(params, shared, __shfl_sync(kAllLanes, warp / 4 - 1, 0)).run();
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm90
