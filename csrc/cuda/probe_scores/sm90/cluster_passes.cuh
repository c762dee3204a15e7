// Both passes in one kernel, where the keys of a head fit into the shared memory of a cluster. Each block holds some of
// the head's rows and its share of the keys; between the passes the cluster's blocks send each other what they found of
// the rows.
#pragma once

#include <cuda.h>

#include "common/math.h"
#include "cuda/probe_scores/params.h"
#include "cuda/probe_scores/plan.h"
#include "cuda/probe_scores/probes.cuh"
#include "cuda/probe_scores/sm90/pipeline.cuh"
#include "cuda/probe_scores/statistics.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace zipvl::cuda::probe_scores::sm90 {

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
  static constexpr int kPieces = HeadDim / kPieceElements;
  using Rows = Sw128Slabs<kRows, HeadDim>;
  using Keys = Sw128Slabs<kTileKeys, HeadDim>;
};

// 64 rows of either tile are the first operand of a product, and 128 the second.
template <typename Traits>
struct ClusterShared {
  alignas(1024) typename Traits::Element rows[Traits::Rows::kSlabs][Traits::Rows::kSlabElements];
  alignas(1024) typename Traits::Element keys[Traits::kTiles][Traits::Keys::kSlabs][Traits::Keys::kSlabElements];
  float part_lse[Traits::kMaxBlocks][Traits::kRows];  // over each block's keys
  alignas(16) float lse[Traits::kRows];
  alignas(16) std::int32_t limit[Traits::kRows];
  alignas(16) std::int64_t source[Traits::kRows];  // where a row starts in q, in elements; -1: no probe
  float sums[Traits::kTiles * Traits::kTileKeys];
  int2 range[Traits::kWarpgroups][2];                            // minimum and maximum limit of 32 rows
  std::uint32_t words[Traits::kTiles * Traits::kTileKeys / 32];  // of the packed mask; unused where there is none
  int first_real;                                                // of this block's keys
  int first_real_of[Traits::kMaxBlocks];                         // of each block's
  std::uint64_t keys_full[Traits::kTiles], parts_full;           // mbarriers
};

// The rows and keys of a block. The tiles of keys go round the blocks of the cluster, so that each has early keys,
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
  using Keys = typename Traits::Keys;
  for (int t = 0; t < item.tiles; ++t) {
    ptx::mbarrier_arrive_expect_tx(&shared.keys_full[t], Keys::kBytes);
#pragma unroll
    for (int slab = 0; slab < Keys::kSlabs; ++slab) {
      ptx::tma_load_4d(shared.keys[t][slab], keys, &shared.keys_full[t], slab * kSlabColumns, item.first_key(t), item.h,
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
      limit = limit_of(params, item.b, position);
      if (limit >= 0) {
        source = item.b * params.q_stride[0] + (item.h * group + row % group) * params.q_stride[1] +
                 (position - params.first_query) * params.q_stride[2];
      }
    }
    shared.limit[slot * kUnitRows + thread] = limit;
    shared.source[slot * kUnitRows + thread] = source;
    const int min_limit = __reduce_min_sync(kAllLanes, limit), max_limit = __reduce_max_sync(kAllLanes, limit);
    if (lane == 0) {
      shared.range[slot][warp] = make_int2(min_limit, max_limit);
    }
  } else if (params.token_mask != nullptr) {
    constexpr int kPackers = 2 * Traits::kWarpgroups;  // warps
    const bool* mask = params.token_mask + item.b * params.mask_stride[0];
    for (int word = slot * 2 + warp - 2; word < item.tiles * (Traits::kTileKeys / 32); word += kPackers) {
      const int first = item.first_key(word / (Traits::kTileKeys / 32)) + word % (Traits::kTileKeys / 32) * 32;
      const int token = first + lane;
      const unsigned bits = __ballot_sync(kAllLanes, token < params.tokens && mask[token * params.mask_stride[1]]);
      if (lane == 0) {
        shared.words[word] = bits;
        if (bits != 0) {
          atomicMin(&shared.first_real, first + __ffs(static_cast<int>(bits)) - 1);
        }
      }
    }
  }
}

// Copies the elements of a row to its swizzled place; zeros where the row is no probe. A warpgroup copies its own 64
// rows.
template <typename Traits>
__device__ __forceinline__ void gather_rows(const ProbeScoresParams& params, ClusterShared<Traits>& shared, int slot) {
  using Rows = typename Traits::Rows;
  const auto* q = static_cast<const std::uint16_t*>(params.q);
  const auto for_pieces = [&](const auto& copy) {
#pragma unroll
    for (int i = 0; i < kUnitRows * Traits::kPieces / kWarpgroupThreads; ++i) {
      const int of_slot = i * kWarpgroupThreads + static_cast<int>(threadIdx.x) % kWarpgroupThreads;
      const int row = slot * kUnitRows + of_slot / Traits::kPieces, piece = of_slot % Traits::kPieces;
      const std::int64_t start = shared.source[row];
      auto* target = &shared.rows[piece / 8][Rows::row_elements(row) + Rows::in_row_elements(row, piece)];
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

constexpr int kRowsBarrier = 1;  // of a warpgroup alone, one each

// Minimum and maximum limit of a slot's rows.
template <typename Traits>
__device__ __forceinline__ int2 slot_range(const ClusterShared<Traits>& shared, int slot) {
  const int2 low = shared.range[slot][0], high = shared.range[slot][1];
  return make_int2(min(low.x, high.x), max(low.y, high.y));
}

// First pass: a warpgroup's rows over the block's keys.
template <typename Traits>
__device__ __forceinline__ RowStatistics reduce_rows(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                                     const ClusterItem<Traits>& item, int slot, int row_of_thread) {
  const int2 range = slot_range(shared, slot);
  const int limit[2] = {shared.limit[slot * kUnitRows + row_of_thread],
                        shared.limit[slot * kUnitRows + row_of_thread + 8]};
  const std::uint64_t rows = ptx::wgmma_descriptor(shared.rows[0] + Traits::Rows::row_elements(slot * kUnitRows));
  RowStatistics stats;
  for (int t = 0; t < item.tiles; ++t) {
    const int first_key = item.first_key(t);
    ptx::mbarrier_wait(&shared.keys_full[t], 0);
    if (first_key > range.y) {
      continue;
    }
    float s[Traits::kTileKeys / 2];
    multiply<Traits, typename Traits::Rows, typename Traits::Keys>(s, rows, ptx::wgmma_descriptor(shared.keys[t][0]));
    std::uint32_t words[Traits::kTileKeys / 32];
    bool unmasked = first_key + Traits::kTileKeys - 1 <= range.x;
#pragma unroll
    for (int i = 0; i < Traits::kTileKeys / 32; ++i) {
      words[i] = params.token_mask == nullptr ? 0xFFFFFFFFU : shared.words[t * (Traits::kTileKeys / 32) + i];
      unmasked = unmasked && words[i] == 0xFFFFFFFFU;
    }
    if (!unmasked) {
      apply_mask(s, limit, first_key, words);
    }
    stats.add(s, params.scale_log2);
  }
  stats.reduce(params.scale_log2);
  return stats;
}

// Sends what a warpgroup found of its rows to every block of the cluster, which wait for all of it; then the rows'
// log-sum-exp is known, the blocks' parts added in their order.
template <typename Traits>
__device__ __forceinline__ void exchange_statistics(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                                    const ClusterItem<Traits>& item, const RowStatistics& stats,
                                                    int slot, int row_of_thread) {
  ptx::cluster_wait();  // the other blocks' barriers are ready
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float part = scaled_max(stats.max[i], params.scale_log2) + log2f(stats.sum[i]);  // -inf over no key
    const float* place = &shared.part_lse[item.rank][slot * kUnitRows + row_of_thread + 8 * i];
    for (int to = static_cast<int>(threadIdx.x) % 4; to < item.size; to += 4) {
      ptx::store_async(ptx::shared_address_in(place, to), __float_as_uint(part),
                       ptx::shared_address_in(&shared.parts_full, to));
    }
  }
  if (static_cast<int>(threadIdx.x) < item.size) {
    const auto to = static_cast<std::uint32_t>(threadIdx.x);
    ptx::store_async(ptx::shared_address_in(&shared.first_real_of[item.rank], to),
                     static_cast<std::uint32_t>(shared.first_real), ptx::shared_address_in(&shared.parts_full, to));
  }
  ptx::mbarrier_wait(&shared.parts_full, 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  if (thread < kUnitRows) {
    const int row = slot * kUnitRows + thread;
    float part[Traits::kMaxBlocks];
    float max_part = -INFINITY;
    int first_real = params.tokens;
#pragma unroll
    for (int from = 0; from < Traits::kMaxBlocks; ++from) {
      const bool valid = from < item.size;
      part[from] = valid ? shared.part_lse[from][row] : -INFINITY;
      max_part = fmaxf(max_part, part[from]);
      first_real = valid ? min(first_real, shared.first_real_of[from]) : first_real;
    }
    const float base = max_part == -INFINITY ? 0.0F : max_part;
    float sum = 0.0F;
#pragma unroll
    for (int from = 0; from < Traits::kMaxBlocks; ++from) {
      sum += ptx::exp2(part[from] - base);
    }
    shared.lse[row] = log_sum_exp(base, sum, first_real <= shared.limit[row]);
  }
}

// Adds the weights of a warpgroup's 64 keys, from `first_key` on, over the rows of slot `slot`, and of the next one if
// kValues is 64. min_limit: of those rows.
template <typename Traits, int kValues>
__device__ __forceinline__ void add_slots(float (&sum)[2], const ProbeScoresParams& params,
                                          ClusterShared<Traits>& shared, std::uint64_t keys, int slot, int min_limit,
                                          int first_key, int key_of_thread) {
  float s[kValues];
  using Rows = typename Traits::Rows;
  multiply<Traits, typename Traits::Keys, Rows>(
      s, keys, ptx::wgmma_descriptor(shared.rows[0] + Rows::row_elements(slot * kUnitRows)));
  const float* lse = shared.lse + slot * kUnitRows;
  const std::int32_t* limit = shared.limit + slot * kUnitRows;
  if (first_key + kUnitRows - 1 <= min_limit) {
    add_column_sums<false>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
  } else {
    add_column_sums<true>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
  }
}

// Second pass: a warpgroup takes 64 keys at a time over all rows of the block, two slots a product.
template <typename Traits>
__device__ __forceinline__ void sum_columns(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                            const ClusterItem<Traits>& item, int warpgroup, int key_of_thread) {
  for (int half = warpgroup; half < 2 * item.tiles; half += Traits::kWarpgroups) {
    const int first_key = item.first_key(half / 2) + half % 2 * kUnitRows;
    const std::uint64_t keys =
        ptx::wgmma_descriptor(shared.keys[half / 2][0] + Traits::Keys::row_elements(half % 2 * kUnitRows));
    float sum[2] = {0.0F, 0.0F};
#pragma unroll 1
    for (int slot = 0; slot < Traits::kWarpgroups; slot += 2) {
      const int2 one = slot_range(shared, slot);
      const int2 two = slot + 1 < Traits::kWarpgroups ? slot_range(shared, slot + 1) : make_int2(-1, -1);
      const bool in_one = one.y >= first_key, in_two = two.y >= first_key;
      if (in_one && in_two) {
        add_slots<Traits, 64>(sum, params, shared, keys, slot, min(one.x, two.x), first_key, key_of_thread);
      } else if (in_one || in_two) {
        add_slots<Traits, 32>(sum, params, shared, keys, in_one ? slot : slot + 1, in_one ? one.x : two.x, first_key,
                              key_of_thread);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = quad_sum(sum[i]);
      if (threadIdx.x % 4 == 0) {
        shared.sums[half * kUnitRows + key_of_thread + 8 * i] = total;
      }
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void begin(ClusterShared<Traits>& shared, const ProbeScoresParams& params,
                                      const CUtensorMap* keys) {
  if (threadIdx.x == 0) {
    for (int t = 0; t < Traits::kTiles; ++t) {
      ptx::mbarrier_init(&shared.keys_full[t], 1);
    }
    ptx::mbarrier_init(&shared.parts_full, 1);
    ptx::fence_barrier_init();
    ptx::mbarrier_arrive_expect_tx(&shared.parts_full,
                                   params.cluster_blocks * static_cast<int>(sizeof(shared.part_lse[0]) + sizeof(int)));
    ptx::tma_prefetch(keys);
    shared.first_real = params.token_mask == nullptr ? 0 : params.tokens;
  }
  __syncthreads();
  ptx::cluster_arrive();  // waited for before the first store into another block
  // In this order: once the next kernel starts, whatever came before this one is done and may be read.
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    probe_cluster_sm90(const __grid_constant__ ProbeScoresParams params, const __grid_constant__ CUtensorMap keys) {
  auto& shared = aligned_shared<ClusterShared<Traits>>();
  const ClusterItem<Traits> item(params);
  begin(shared, params, &keys);
  // Through lane 0, so that the compiler knows it to be the same in the whole warp.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (threadIdx.x == Traits::kThreads - kWarpThreads) {  // of a warp that places no rows
    load_keys(shared, item, &keys);
  }
  place_rows(params, shared, item, warpgroup);
  __syncthreads();
  gather_rows(params, shared, warpgroup);
  ptx::named_barrier_sync(kRowsBarrier + warpgroup, kWarpgroupThreads);

  const int place = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpThreads * 16 +
                    static_cast<int>(threadIdx.x) % kWarpThreads / 4;  // of a thread's accumulators
  exchange_statistics(params, shared, item, reduce_rows(params, shared, item, warpgroup, place), warpgroup, place);
  __syncthreads();
  sum_columns(params, shared, item, warpgroup, place);
  __syncthreads();

  const std::int64_t head = static_cast<std::int64_t>(item.b) * params.kv_heads + item.h;
  float* sums = params.sums + (head * params.row_splits + item.part) * params.tokens;
  for (int i = static_cast<int>(threadIdx.x); i < item.tiles * Traits::kTileKeys; i += Traits::kThreads) {
    const int key = item.first_key(i / Traits::kTileKeys) + i % Traits::kTileKeys;
    if (key < params.tokens) {
      sums[key] = shared.sums[i];
    }
  }
}

}  // namespace zipvl::cuda::probe_scores::sm90
