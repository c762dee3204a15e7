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
  ptx::fence_barrier_init();
}

template <typename Traits>
__device__ __forceinline__ void produce(const AttnParams& params, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        SharedStorage<Traits>& shared) {
  const int lane = threadIdx.x % kWarpThreads;
  switch (static_cast<ProducerWarp>(threadIdx.x / kWarpThreads)) {
    case ProducerWarp::kKeysValues:
      if (lane == 0) {
        load_keys_values(params, k_map, v_map, shared);
      }
      break;
    case ProducerWarp::kQueries0:
    case ProducerWarp::kQueries1:
      load_queries(params, shared, threadIdx.x / kWarpThreads - static_cast<int>(ProducerWarp::kQueries0), lane);
      break;
    case ProducerWarp::kZeros:
      if (params.zeros != nullptr) {
        write_zeros(params, shared, lane);
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
    RowPlaces& places = consumer.places();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of_thread + 8 * i;
      const int place = tile.block * Traits::kBlockM + row;
      rows.max[i] = -INFINITY;
      rows.sum[i] = 0.0F;
      places.limit[i] = keys_seen<Traits::kBlockM>(params, tile, row).first;
      places.output[i] = -1;
      if (place < query_rows(params, tile.batch)) {
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
    make_tile_table<Traits::kBlockM>(params, shared.table, kKeyBytes, threadIdx.x % kWarpThreads);
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    produce<Traits>(params, &k_map, &v_map, shared);
  } else {
    ptx::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    consume<Traits>(params, shared);
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm90
