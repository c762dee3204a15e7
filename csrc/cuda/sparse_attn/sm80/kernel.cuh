// Attention among the selected tokens on mma.sync, after FlashAttention-2 (arXiv 2307.08691): a block takes kBlockM
// query rows of a head and walks the packed keys it sees from the last tile to the first. K, V and Q rows are gathered
// by cp.async where they lie; the next tile's K arrives during the softmax and the second product, V during the first
// one.
#pragma once

#include <cstdint>
#include <numbers>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm80/mainloop.cuh"
#include "cuda/sparse_attn/sm80/scheduler.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm80 {

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
  mma_qk<Traits>(s, Operands::of(shared, tile));
  load_after_scores(params, shared, tile);
  if (tile >= shared.whole_tiles) {
    apply_mask(s, shared.limit + threadIdx.x / kWarpThreads * 16 * Traits::kRowTiles, tile * Traits::kBlockN);
  }
  const float scale_log2 = params.scale * std::numbers::log2e_v<float>;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
    float rescale[2];
    update_max(s, acc.rows, rescale, m, scale_log2);
    rescale_o(acc.o, acc.rows, rescale, m);
  }
  mma_pv<Traits>(acc.o, s, acc.rows, scale_log2, Operands::of(shared, tile));
}

// Output rows from accumulators to their tokens' places, by way of the warp's own rows of the query tile, which nothing
// reads any more: so 16 bytes a lane and whole rows a warp go out. out: token 0 of the head, row_elements a token.
template <typename Traits>
__device__ __forceinline__ void store_rows(const Output<Traits>& o, const RowState<Traits::kRowTiles>& rows,
                                           SharedStorage<Traits>& shared, typename Traits::Element* out,
                                           std::int64_t row_elements) {
  using Rows = typename Traits::Rows;
  constexpr int kRows = 16 * Traits::kRowTiles;
  const int lane = threadIdx.x % kWarpThreads, first_row = threadIdx.x / kWarpThreads * kRows;
  char* tile = reinterpret_cast<char*>(shared.q) + first_row * Rows::kRowBytes;
  __syncwarp();  // every lane has read its last queries
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(rows.sum[m][i]);
      const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;  // a row that sees no key is 0; NaN stays
      const int row = m * 16 + i * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < Traits::kHeadDim / 8; ++j) {
        *reinterpret_cast<std::uint32_t*>(tile + Rows::offset(row, j) + lane % 4 * 4) =
            pack_pair<typename Traits::Element>(o[m][j][2 * i] * inverse, o[m][j][2 * i + 1] * inverse);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int at = lane; at < kRows * Rows::kPieces; at += kWarpThreads) {
    const int row = at / Rows::kPieces, piece = at % Rows::kPieces;
    if (first_row + row < shared.queries) {
      *reinterpret_cast<uint4*>(out + shared.query_token[first_row + row] * row_elements + piece * kPieceElements) =
          *reinterpret_cast<const uint4*>(tile + Rows::offset(row, piece));
    }
  }
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

// Zeros in the rows of tokens outside the selection. selected: kThreads bytes of shared memory. rows: the batch row's,
// row_bytes a token.
template <typename Traits>
__device__ __forceinline__ void write_zeros(const Selection& selection, const Job& job, unsigned char* selected,
                                            char* rows, std::int64_t row_bytes) {
  constexpr int kTokens = Traits::kThreads;  // whose membership is settled at once
  const int tokens = static_cast<int>(selection.tokens), thread = static_cast<int>(threadIdx.x);
  const int share = (tokens + job.of - 1) / job.of;
  const std::int64_t start = static_cast<std::int64_t>(job.number) * share;
  const int end = static_cast<int>(min(start + share, std::int64_t{tokens}));
  if (start >= end) {
    return;
  }
  int place = selection.seen_by(static_cast<int>(start) - 1);
  for (int begin = static_cast<int>(start); begin < end; begin += kTokens) {
    const int here = min(kTokens, end - begin);
    selected[thread] = 0;
    __syncthreads();
    bool inside = false;
    if (place + thread < selection.count) {
      const int token = static_cast<int>(selection.token(place + thread));
      inside = token < begin + here;
      if (inside && token >= begin) {
        selected[token - begin] = 1;
      }
    }
    place += __syncthreads_count(inside);
    for (int t = 0; t < here; ++t) {
      if (selected[t] == 0) {
        char* row = rows + (begin + t) * row_bytes;
        for (std::int64_t byte = thread * kPieceBytes; byte < row_bytes; byte += kTokens * kPieceBytes) {
          *reinterpret_cast<uint4*>(row + byte) = make_uint4(0, 0, 0, 0);
        }
      }
    }
    __syncthreads();
  }
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
  } else if (params.zeros != nullptr) {
    write_zeros<Traits>(selection, job, memory,
                        static_cast<char*>(params.zeros) + batch * params.tokens * params.zero_row_bytes,
                        params.zero_row_bytes);
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm80
