// The Hopper kernel: a persistent block a multiprocessor, one producer warpgroup and the consumers.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sparse_attn/sm90/load.cuh"
#include "cuda/sparse_attn/sm90/mainloop.cuh"
#include "cuda/sparse_attn/sm90/scheduler.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

template <typename Traits>
__device__ __forceinline__ void init_barriers(SharedStorage<Traits>& shared) {
  constexpr int kConsumerWarps = Traits::kConsumers * kWarpgroupThreads / kWarpThreads;
  for (int i = 0; i < Traits::kQueryStages; ++i) {
    ptx::mbarrier_init(&shared.q_full[i], kQueryWarps * kWarpThreads);
    ptx::mbarrier_init(&shared.q_empty[i], kConsumerWarps);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    ptx::mbarrier_init(&shared.k_full[i], 1);
    ptx::mbarrier_init(&shared.k_empty[i], kConsumerWarps);
    ptx::mbarrier_init(&shared.v_full[i], 1);
    ptx::mbarrier_init(&shared.v_empty[i], kConsumerWarps);
  }
  if constexpr (Traits::kRanged) {
    for (int i = 0; i < Traits::kQueryStages; ++i) {
      // Every thread arrives, once a tile: each hands on what it has written or read itself.
      ptx::mbarrier_init(&shared.ranged.rows_full[i], kQueryWarps * kWarpThreads);
      ptx::mbarrier_init(&shared.ranged.rows_empty[i], kConsumerWarps * kWarpThreads + 1);  // one loads keys
    }
    ptx::mbarrier_init(&shared.ranged.sinks.full, 1);
    ptx::mbarrier_init(&shared.ranged.sinks.empty, kConsumerWarps);
  }
  ptx::fence_barrier_init();
}

// load_keys: brings the keys and values of every tile, by one thread.
template <typename Traits, typename LoadKeys>
__device__ __forceinline__ void produce(const AttnParams& params, SharedStorage<Traits>& shared,
                                        const LoadKeys& load_keys) {
  const int lane = threadIdx.x % kWarpThreads;
  switch (static_cast<ProducerWarp>(threadIdx.x / kWarpThreads)) {
    case ProducerWarp::kKeysValues:
      if (lane == 0) {
        load_keys();
      }
      break;
    case ProducerWarp::kQueries0:
    case ProducerWarp::kQueries1:
      load_queries(params, shared, threadIdx.x / kWarpThreads - static_cast<int>(ProducerWarp::kQueries0), lane);
      break;
    case ProducerWarp::kZeros:
      if constexpr (!Traits::kRanged) {
        if (params.zeros != nullptr) {
          write_zeros(params, shared, lane);
        }
      }
      break;
  }
}

// x[i] of lane j of a quad <-> x[j] of lane i.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&x)[4]) {
  const bool odd = threadIdx.x % 2 == 1, high = threadIdx.x % 4 >= 2;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const std::uint32_t got = __shfl_xor_sync(kAllLanes, odd ? x[k] : x[k + 1], 1);
    x[k] = odd ? got : x[k];
    x[k + 1] = odd ? x[k + 1] : got;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::uint32_t got = __shfl_xor_sync(kAllLanes, high ? x[k] : x[k + 2], 2);
    x[k] = high ? got : x[k];
    x[k + 2] = high ? x[k + 2] : got;
  }
}

// o [64, D] of a warpgroup divided by the rows' sums; target[i]: where the thread's row i begins, null: nowhere. A
// thread holds two adjacent columns of every eight; the four lanes of a quad exchange them so that each stores 16
// bytes, and the quad 64 adjacent ones.
template <typename Element, int kOutputs>
__device__ __forceinline__ void store_rows(const float (&o)[kOutputs], const RowState& rows,
                                           Element* const (&target)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(rows.sum[i]);
    const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;  // a row that sees no key is 0; NaN stays
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) {
      std::uint32_t x[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int at = 4 * (4 * j + g) + 2 * i;
        x[g] = pack_pair<Element>(o[at] * inverse, o[at + 1] * inverse);
      }
      transpose_quad(x);
      if (target[i] != nullptr) {
        *reinterpret_cast<uint4*>(target[i] + 32 * j + 8 * (threadIdx.x % 4)) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void consume(const AttnParams& params, SharedStorage<Traits>& shared) {
  using Element = typename Traits::Element;
  // Through lane 0, so that the compiler knows it to be the same in the whole warp: addresses of operands depend on it.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1, 0);
  const int row_of_thread = warpgroup * 64 + (threadIdx.x % kWarpgroupThreads) / kWarpThreads * 16 +
                            threadIdx.x % kWarpThreads / 4;  // and the row 8 after it
  Consumer<Traits> consumer(shared, params.scale_log2, warpgroup);
  consumer.begin_turns();
  for (TileWalk walk(params, shared.table); walk.valid(); walk.next()) {
    const Tile tile = walk.tile();
    const KeyRange keys = keys_seen<Traits::kBlockM>(params, tile, warpgroup * 64);
    const int blocks = (keys.last + Traits::kBlockN - 1) / Traits::kBlockN;
    RowState rows;
    RowPlaces<false>& places = consumer.places();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of_thread + 8 * i;
      const int place = tile.block * Traits::kBlockM + row;
      rows.max[i] = -INFINITY;
      rows.sum[i] = 0.0F;
      places.limit[i] = keys_seen<Traits::kBlockM>(params, tile, row).first;
      places.output[i] = -1;
      if (place < query_rows<false>(params, tile.batch)) {
        const std::int64_t token =
            params.all_queries
                ? place
                : min(max(__ldcg(params.index + tile.batch * params.index_stride[0] + place * params.index_stride[1]),
                          0),
                      params.tokens - 1);
        places.output[i] =
            ((tile.batch * static_cast<std::int64_t>(params.tokens) + token) * params.query_heads + tile.head) *
            Traits::kHeadDim;
      }
    }
    float o[Traits::kHeadDim / 2];
    if (blocks > 0) {
      consumer.attend(o, rows, blocks, keys.first);
    } else {
      consumer.skip();
#pragma unroll
      for (float& x : o) {
        x = 0.0F;
      }
    }
    Element* target[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      target[i] = places.output[i] < 0 ? nullptr : static_cast<Element*>(params.out) + places.output[i];
    }
    store_rows<Element>(o, rows, target);
  }
}

// As store_rows, of ranged attention: rows with their log-sum-exp, merged with what is there where ranges say so.
template <typename Traits, bool kMerges, int kOutputs>
__device__ __forceinline__ void store_ranged_rows(const AttnParams& params, const Tile& tile,
                                                  const float (&o)[kOutputs], const RowState& rows,
                                                  const RowPlaces<true>& places) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = places.row[i];
    const std::int64_t at = static_cast<std::int64_t>(row) * params.query_heads + tile.head;
    const std::int64_t lse_row =
        (static_cast<std::int64_t>(tile.batch) * (params.query_heads - 1) + tile.head) * params.tokens + row;
    float* lse = params.ranges.lse == nullptr || row < 0 ? nullptr : params.ranges.lse + lse_row;
    const Merge merge = merge_row<kMerges>(rows, i, params.scale_log2, lse);
    // What sees nothing leaves the other pass's row as it is.
    const bool stores = row >= 0 && !(kMerges && merge.inverse == 0.0F);
    Element* target = stores ? static_cast<Element*>(params.out) + at * Traits::kHeadDim : nullptr;
    const int own_piece = 8 * (threadIdx.x % 4);
    [[maybe_unused]] uint4 there[kOutputs / 16];  // all at once, so that their latency is paid once
    if constexpr (kMerges) {
#pragma unroll
      for (int j = 0; j < kOutputs / 16; ++j) {
        there[j] = stores && merge.other != 0.0F ? __ldcg(reinterpret_cast<const uint4*>(target + 32 * j + own_piece))
                                                 : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) {
      std::uint32_t x[4];
      if constexpr (kMerges) {
        x[0] = there[j].x, x[1] = there[j].y, x[2] = there[j].z, x[3] = there[j].w;
        transpose_quad(x);
      }
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int from = 4 * (4 * j + g) + 2 * i;
        if constexpr (kMerges) {
          const float2 before = unpack_pair<Element>(x[g]);
          x[g] = pack_pair<Element>(o[from] * merge.inverse + before.x * merge.other,
                                    o[from + 1] * merge.inverse + before.y * merge.other);
        } else {
          x[g] = pack_pair<Element>(o[from] * merge.inverse, o[from + 1] * merge.inverse);
        }
      }
      transpose_quad(x);
      if (target != nullptr) {
        *reinterpret_cast<uint4*>(target + 32 * j + own_piece) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void consume_ranged(const AttnParams& params, SharedStorage<Traits>& shared) {
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1, 0);
  const int row_of_thread = warpgroup * 64 + (threadIdx.x % kWarpgroupThreads) / kWarpThreads * 16 +
                            threadIdx.x % kWarpThreads / 4;  // and the row 8 after it
  Consumer<Traits> consumer(shared, params.scale_log2, warpgroup);
  consumer.begin_turns();
  while (true) {
    const auto tile = consumer.next_tile(params, row_of_thread);
    if (tile.tile.batch < 0) {
      return;
    }
    RowState rows;
    rows.max[0] = rows.max[1] = -INFINITY;
    rows.sum[0] = rows.sum[1] = 0.0F;
    float o[Traits::kHeadDim / 2];
    if (tile.blocks > 0) {
      consumer.attend(o, rows, tile.blocks, tile.clear_end, tile.clear_first, tile.sinks);
    } else {
      consumer.skip();
#pragma unroll
      for (float& x : o) {
        x = 0.0F;
      }
    }
    if (params.ranges.merges) {
      store_ranged_rows<Traits, true>(params, tile.tile, o, rows, consumer.places());
    } else {
      store_ranged_rows<Traits, false>(params, tile.tile, o, rows, consumer.places());
    }
  }
}

// Launched right after pack_kv, which lets it start once all kernels before pack_kv itself are done: only the packed
// keys and values are waited for. What those kernels wrote is read past the first-level cache, which may still hold
// what was there before.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    sparse_attn_sm90(const __grid_constant__ AttnParams params, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ unsigned char shared_bytes[];
  auto& shared =
      *reinterpret_cast<SharedStorage<Traits>*>((reinterpret_cast<std::uintptr_t>(shared_bytes) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    ptx::tma_prefetch(&k_map);
    ptx::tma_prefetch(&v_map);
  }
  if (threadIdx.x / kWarpThreads == 1) {
    constexpr int kKeyBytes = 2 * Traits::kHeadDim * sizeof(typename Traits::Element);
    make_tile_table<Traits::kBlockM, false>(params, shared.table, kKeyBytes, threadIdx.x % kWarpThreads);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    produce<Traits>(params, shared, [&] { load_keys_values(params, &k_map, &v_map, shared); });
  } else {
    ptx::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    consume<Traits>(params, shared);
  }
}

// Ranged attention. What it reads was written by kernels before it, the last of which it waits for.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    ranged_attn_sm90(const __grid_constant__ AttnParams params, const __grid_constant__ RangedMaps maps) {
  extern __shared__ unsigned char shared_bytes[];
  auto& shared =
      *reinterpret_cast<SharedStorage<Traits>*>((reinterpret_cast<std::uintptr_t>(shared_bytes) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    for (const CUtensorMap* map : {&maps.k, &maps.v, &maps.sink_k, &maps.sink_v}) {
      ptx::tma_prefetch(map);
    }
  }
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();
  if (threadIdx.x / kWarpThreads == 1) {
    constexpr int kKeyBytes = 2 * Traits::kHeadDim * sizeof(typename Traits::Element);
    make_tile_table<Traits::kBlockM, true>(params, shared.table, kKeyBytes, threadIdx.x % kWarpThreads);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    produce<Traits>(params, shared, [&] { load_ranged_keys_values(params, maps, shared); });
  } else {
    ptx::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    consume_ranged<Traits>(params, shared);
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm90
