// Attention among the selected tokens on mma.sync, after FlashAttention-2 (arXiv 2307.08691): a block takes kBlockM
// query rows of a head and walks the packed keys it sees from the last tile to the first. K, V and Q rows are gathered
// by cp.async where they lie; the next tile's K arrives during the softmax and the second product, V during the first
// one.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm80/epilogue.cuh"
#include "cuda/sparse_attn/sm80/load.cuh"
#include "cuda/sparse_attn/sm80/mma.cuh"
#include "cuda/sparse_attn/sm80/scheduler.cuh"
#include "cuda/sparse_attn/sm80/softmax.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"
#include "cuda/sparse_attn/sm80/zeros.cuh"

namespace zipvl::cuda::attn::sm80 {

// Finds out which rows the block needs, and starts on its queries and on its last tile of keys.
template <typename Traits>
__device__ __forceinline__ KeyRange begin_block(const SparseAttnParams& params, const Selection& selection, int block,
                                                SharedStorage<Traits>& shared) {
  const int head = static_cast<int>(blockIdx.x), batch = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), begin = block * Traits::kBlockM;
  const KeyRange range = keys_seen<Traits>(params, selection, block);
  const int queries = query_rows(params, selection);
  if (thread < Traits::kBlockM) {
    const int query = min(begin + thread, queries - 1);
    shared.query_token[thread] = params.all_queries ? static_cast<std::uint32_t>(query) : selection.token(query);
    shared.limit[thread] = keys_seen_by(params, selection, range, begin + thread);
  }
  if (thread == 0) {
    const int kv_head = head / static_cast<int>(params.query_heads / params.kv_heads);
    shared.k_head = head_of<Traits>(params.k, params.k_stride, batch, kv_head);
    shared.v_head = head_of<Traits>(params.v, params.v_stride, batch, kv_head);
    shared.index_row = selection.index;
    shared.seen = range.last;
    shared.whole_tiles = range.first / Traits::kBlockN;
    shared.queries = queries - begin;
  }
  __syncthreads();
  if (range.last > 0) {
    const int tile = (range.last - 1) / Traits::kBlockN;
    load_index(params, shared, tile);
    ptx::cp_async_commit();
    load_rows<Traits, Traits::kBlockM, true>(
        ptx::shared_address(shared.q), head_of<Traits>(params.q, params.q_stride, batch, head), params.q_stride[2],
        queries - begin, [&](int row) { return shared.query_token[row]; });
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    load_first(params, shared, tile);
  }
  return range;
}

template <typename Traits>
struct Accumulators {
  Output<Traits> o;
  RowState<Traits::kRowTiles> rows;
};

// One tile of keys. On entry its K is on the way, or all of it; on exit the same of the tile before it.
template <typename Traits>
__device__ __forceinline__ void attend_tile(const SparseAttnParams& params, SharedStorage<Traits>& shared,
                                            Accumulators<Traits>& acc, int tile) {
  ptx::cp_async_wait<0>();
  __syncthreads();  // what was on the way is here, and no warp needs the last tile
  load_during_scores(params, shared, tile);
  Scores<Traits> s{};
  scores_of<Traits>(s, Operands::of(shared, tile));
  load_after_scores(params, shared, tile);
  if (tile >= shared.whole_tiles) {
    hide(s, shared.limit + threadIdx.x / kWarpThreads * 16 * Traits::kRowTiles, tile * Traits::kBlockN);
  }
  constexpr float kLog2E = 1.4426950408889634F;
  const float scale_log2 = params.scale * kLog2E;
  move_maximum(s, acc.o, acc.rows, scale_log2);
  add_values<Traits>(acc.o, s, acc.rows, scale_log2, Operands::of(shared, tile));
}

template <typename Traits>
__device__ __forceinline__ void attend_block(const SparseAttnParams& params, const Selection& selection, int block,
                                             SharedStorage<Traits>& shared) {
  const KeyRange range = begin_block<Traits>(params, selection, block, shared);
  Accumulators<Traits> acc{};
  int tile = (range.last + Traits::kBlockN - 1) / Traits::kBlockN - 1;
#pragma unroll 1
  for (; tile >= 0; --tile) {
    attend_tile<Traits>(params, shared, acc, tile);
  }
  store_rows<Traits>(acc.o, acc.rows, shared,
                     static_cast<typename Traits::Element*>(params.out) +
                         (blockIdx.y * params.tokens * params.query_heads + blockIdx.x) * Traits::kHeadDim,
                     params.query_heads * Traits::kHeadDim);
}

// first_wave: places of a head and batch row that start at once.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    sparse_attn_sm80(const __grid_constant__ SparseAttnParams params, int first_wave) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(memory);
  const int batch = static_cast<int>(blockIdx.y);
  const Selection selection(params, batch);
  const Job job = job_of<Traits>(params, selection, first_wave);
  if (job.attends) {
    attend_block<Traits>(params, selection, job.number, shared);
  } else {
    const std::int64_t row_bytes = params.query_heads * Traits::kRowBytes;
    write_zeros<Traits>(selection, job, memory, static_cast<char*>(params.out) + batch * params.tokens * row_bytes,
                        row_bytes);
  }
}

}  // namespace zipvl::cuda::attn::sm80
