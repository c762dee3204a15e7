// Both passes in one kernel, where the keys of a head fit into the shared memory of a cluster. Each block holds some of
// the head's rows and its share of the keys; between the passes the cluster's blocks send each other what they found of
// the rows.
#pragma once

#include "cuda/probe_scores/sm90/cluster_block.cuh"
#include "cuda/probe_scores/tile_math.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace zipvl::cuda::probe::sm90 {

constexpr int kRowsBarrier = 1;  // of a warpgroup alone, one each

// s = 64 rows of a x rows of b^T, done on return.
template <typename Traits, int kValues>
__device__ __forceinline__ void multiply(float (&s)[kValues], std::uint64_t a, int a_slab_bytes, std::uint64_t b,
                                         int b_slab_bytes) {
  using Product = ptx::Wgmma<typename Traits::Element, kValues * 2, false>;
  ptx::warpgroup_fence_operand(s);
  ptx::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
    const int slab = k / 4, in_slab = k % 4 * 32;
    Product::ss(s, ptx::wgmma_advance(a, slab * a_slab_bytes + in_slab),
                ptx::wgmma_advance(b, slab * b_slab_bytes + in_slab), k > 0);
  }
  ptx::warpgroup_commit_batch();
  ptx::warpgroup_wait<0>();
  ptx::warpgroup_fence_operand(s);
}

constexpr int kRowBytes = kSlabColumns * 2;  // of a slab

// Least and greatest limit of a slot's rows.
template <typename Traits>
__device__ __forceinline__ int2 slot_range(const ClusterShared<Traits>& shared, int slot) {
  const int2 low = shared.range[slot][0], high = shared.range[slot][1];
  return make_int2(min(low.x, high.x), max(low.y, high.y));
}

// First pass: a warpgroup's rows over the block's keys.
template <typename Traits>
__device__ __forceinline__ RowStats reduce_rows(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                                const ClusterItem<Traits>& item, int slot, int row_of_thread) {
  const int2 range = slot_range(shared, slot);
  const int limit[2] = {shared.limit[slot * kUnitRows + row_of_thread],
                        shared.limit[slot * kUnitRows + row_of_thread + 8]};
  const std::uint64_t rows = ptx::wgmma_descriptor(shared.rows[0] + slot * kUnitRows * kSlabColumns);
  RowStats stats;
  for (int t = 0; t < item.tiles; ++t) {
    const int first_key = item.first_key(t);
    ptx::mbarrier_wait(&shared.keys_here[t], 0);
    if (first_key > range.y) {
      continue;
    }
    float s[Traits::kTileKeys / 2];
    multiply<Traits>(s, rows, Traits::kRows * kRowBytes, ptx::wgmma_descriptor(shared.keys[t][0]),
                     Traits::kTileKeys * kRowBytes);
    std::uint32_t words[Traits::kTileKeys / 32];
    bool all_seen = first_key + Traits::kTileKeys - 1 <= range.x;
#pragma unroll
    for (int i = 0; i < Traits::kTileKeys / 32; ++i) {
      words[i] = params.token_mask == nullptr ? 0xFFFFFFFFU : shared.words[t * (Traits::kTileKeys / 32) + i];
      all_seen = all_seen && words[i] == 0xFFFFFFFFU;
    }
    if (!all_seen) {
      hide_keys(s, limit, first_key, words);
    }
    stats.add(s, params.scale_log2);
  }
  stats.reduce(params.scale_log2);
  return stats;
}

// Sends what a warpgroup found of its rows to every block of the cluster, which wait for all of it; then the rows'
// log-sum-exp is known, the blocks' parts added in their order.
template <typename Traits>
__device__ __forceinline__ void exchange_parts(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                               const ClusterItem<Traits>& item, const RowStats& stats, int slot,
                                               int row_of_thread) {
  ptx::cluster_wait();  // the other blocks' barriers are ready
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float part = base_of(stats.max[i], params.scale_log2) + log2f(stats.sum[i]);  // -inf over no key
    const float* place = &shared.part_lse[item.rank][slot * kUnitRows + row_of_thread + 8 * i];
    for (int to = static_cast<int>(threadIdx.x) % 4; to < item.size; to += 4) {
      ptx::store_async(ptx::shared_address_in(place, to), __float_as_uint(part),
                       ptx::shared_address_in(&shared.parts_here, to));
    }
  }
  if (static_cast<int>(threadIdx.x) < item.size) {
    const auto to = static_cast<std::uint32_t>(threadIdx.x);
    ptx::store_async(ptx::shared_address_in(&shared.first_real_of[item.rank], to),
                     static_cast<std::uint32_t>(shared.first_real), ptx::shared_address_in(&shared.parts_here, to));
  }
  ptx::mbarrier_wait(&shared.parts_here, 0);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  if (thread < kUnitRows) {
    const int row = slot * kUnitRows + thread;
    float part[Traits::kMaxBlocks];
    float most = -INFINITY;
    int first_real = params.tokens;
#pragma unroll
    for (int from = 0; from < Traits::kMaxBlocks; ++from) {
      const bool valid = from < item.size;
      part[from] = valid ? shared.part_lse[from][row] : -INFINITY;
      most = fmaxf(most, part[from]);
      first_real = valid ? min(first_real, shared.first_real_of[from]) : first_real;
    }
    const float base = most == -INFINITY ? 0.0F : most;
    float sum = 0.0F;
#pragma unroll
    for (int from = 0; from < Traits::kMaxBlocks; ++from) {
      sum += ptx::exp2(part[from] - base);
    }
    shared.lse[row] = log_sum_exp(base, sum, first_real <= shared.limit[row]);
  }
}

// Adds the weights of a warpgroup's 64 keys, from `first_key` on, over the rows of slot `slot`, and of the next one if
// kValues is 64. `least` of their limits.
template <typename Traits, int kValues>
__device__ __forceinline__ void add_slots(float (&sum)[2], const ProbeScoresParams& params,
                                          ClusterShared<Traits>& shared, std::uint64_t keys, int slot, int least,
                                          int first_key, int key_of_thread) {
  float s[kValues];
  multiply<Traits>(s, keys, Traits::kTileKeys * kRowBytes,
                   ptx::wgmma_descriptor(shared.rows[0] + slot * kUnitRows * kSlabColumns), Traits::kRows * kRowBytes);
  const float* lse = shared.lse + slot * kUnitRows;
  const std::int32_t* limit = shared.limit + slot * kUnitRows;
  if (first_key + kUnitRows - 1 <= least) {
    add_weights<false>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
  } else {
    add_weights<true>(sum, s, lse, limit, first_key + key_of_thread, params.scale_log2);
  }
}

// Second pass: a warpgroup takes 64 keys at a time over all rows of the block, two slots a product.
template <typename Traits>
__device__ __forceinline__ void sum_weights(const ProbeScoresParams& params, ClusterShared<Traits>& shared,
                                            const ClusterItem<Traits>& item, int warpgroup, int key_of_thread) {
  for (int half = warpgroup; half < 2 * item.tiles; half += Traits::kWarpgroups) {
    const int first_key = item.first_key(half / 2) + half % 2 * kUnitRows;
    const std::uint64_t keys = ptx::wgmma_descriptor(shared.keys[half / 2][0] + half % 2 * kUnitRows * kSlabColumns);
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
      ptx::mbarrier_init(&shared.keys_here[t], 1);
    }
    ptx::mbarrier_init(&shared.parts_here, 1);
    ptx::fence_barrier_init();
    ptx::mbarrier_arrive_expect_tx(&shared.parts_here,
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
  const int warpgroup = __shfl_sync(0xFFFFFFFFU, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (threadIdx.x == Traits::kThreads - kWarpThreads) {  // of a warp that places no rows
    load_keys(shared, item, &keys);
  }
  place_rows(params, shared, item, warpgroup);
  __syncthreads();
  gather_rows(params, shared, warpgroup);
  ptx::named_barrier_sync(kRowsBarrier + warpgroup, kWarpgroupThreads);

  const int place = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpThreads * 16 +
                    static_cast<int>(threadIdx.x) % kWarpThreads / 4;  // of a thread's accumulators
  exchange_parts(params, shared, item, reduce_rows(params, shared, item, warpgroup, place), warpgroup, place);
  __syncthreads();
  sum_weights(params, shared, item, warpgroup, place);
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

}  // namespace zipvl::cuda::probe::sm90
