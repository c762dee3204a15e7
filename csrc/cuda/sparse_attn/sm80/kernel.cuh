// Attention among the selected tokens on mma.sync, after FlashAttention-2 (arXiv 2307.08691): a block takes kBlockM
// query rows of a head and walks the packed keys it sees from the last tile to the first. K, V and Q rows are gathered
// by cp.async where they lie; the next tile's K arrives during the softmax and the second product, V during the first
// one.
#pragma once

#include <climits>
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

// Starts on the block's queries and on its last tile of keys.
template <typename Traits>
__device__ __forceinline__ void begin_loads(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  load_index(params, shared, tile);
  ptx::cp_async_commit();
  load_rows<Traits, Traits::kBlockM, true>(
      ptx::shared_address(shared.q), head_of<Traits>(params.q, params.q_stride, blockIdx.y, blockIdx.x),
      params.q_stride[2], shared.queries, [&](int row) { return shared.query_token[row]; });
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  load_first(params, shared, tile);
}

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
    begin_loads(params, shared, (range.last - 1) / Traits::kBlockN);
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
  const int first_row = threadIdx.x / kWarpThreads * 16 * Traits::kRowTiles;
  if constexpr (Traits::kRanged) {
    const bool sinks = tile < shared.ranged.sink_tiles;
    const int first_key = list_tile(shared, tile) * Traits::kBlockN;
    if (sinks || first_key < shared.ranged.clear_first || first_key + Traits::kBlockN > shared.ranged.clear_end) {
      apply_mask(s, shared.ranged.first + first_row, shared.limit + first_row, sinks ? shared.ranged.num_sinks : 0,
                 first_key);
    }
  } else if (tile >= shared.whole_tiles) {
    apply_mask(s, shared.limit + first_row, tile * Traits::kBlockN);
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

// What a row of a pass over some keys weighs beside what another pass left in `out`: out = o * own + out * other.
struct Merge {
  float own, other;
};

// lse: of the row and head, written or, with ranges.merges, read; null: there is none. Every lane of the row's quad
// calls it.
__device__ __forceinline__ Merge merge_row(const RowRanges& ranges, float max, float sum, float* lse) {
  Merge merge{sum == 0.0F ? 0.0F : 1.0F / sum, 0.0F};  // a row that sees no key is 0; NaN stays
  if (lse == nullptr) {
    return merge;
  }
  const float own = sum == 0.0F ? -INFINITY : max + log2f(sum);
  if (!ranges.merges) {
    if (threadIdx.x % 4 == 0) {
      *lse = own;
    }
    return merge;
  }
  const float before = *lse, top = fmaxf(own, before);
  if (top == -INFINITY) {
    return merge;  // neither sees anything
  }
  const float mine = exp2f(own - top), theirs = exp2f(before - top), both = 1.0F / (mine + theirs);
  return {merge.own * mine * both, theirs * both};
}

// Output rows from accumulators to their tokens' places, by way of the warp's own rows of the query tile, which nothing
// reads any more: so 16 bytes a lane and whole rows a warp go out. out: token 0 of the head, row_elements a token.
// lse: of the head, a query each; kRanged.
template <typename Traits>
__device__ __forceinline__ void store_rows(const SparseAttnParams& params, const Output<Traits>& o,
                                           const RowState<Traits::kRowTiles>& rows, SharedStorage<Traits>& shared,
                                           typename Traits::Element* out, std::int64_t row_elements,
                                           [[maybe_unused]] float* lse) {
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
      const int row = m * 16 + i * 8 + lane / 4;
      if constexpr (Traits::kRanged) {
        const bool exists = first_row + row < shared.queries;
        const std::int64_t query = shared.query_token[first_row + row];
        const Merge merge =
            merge_row(params.ranges, rows.max[m][i], sum, lse == nullptr || !exists ? nullptr : lse + query);
        const auto* before = reinterpret_cast<const std::uint32_t*>(out + query * row_elements) + lane % 4;
#pragma unroll
        for (int j = 0; j < Traits::kHeadDim / 8; ++j) {
          const float2 there =
              unpack_pair<typename Traits::Element>(merge.other != 0.0F ? before[4 * j] : std::uint32_t{0});
          *reinterpret_cast<std::uint32_t*>(tile + Rows::offset(row, j) + lane % 4 * 4) =
              pack_pair<typename Traits::Element>(o[m][j][2 * i] * merge.own + there.x * merge.other,
                                                  o[m][j][2 * i + 1] * merge.own + there.y * merge.other);
        }
      } else {
        const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;  // a row that sees no key is 0; NaN stays
#pragma unroll
        for (int j = 0; j < Traits::kHeadDim / 8; ++j) {
          *reinterpret_cast<std::uint32_t*>(tile + Rows::offset(row, j) + lane % 4 * 4) =
              pack_pair<typename Traits::Element>(o[m][j][2 * i] * inverse, o[m][j][2 * i + 1] * inverse);
        }
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

// The tiles of the walk, from the last to the first.
template <typename Traits>
__device__ __forceinline__ void attend_tiles(const SparseAttnParams& params, SharedStorage<Traits>& shared,
                                             Accumulators<Traits>& acc, int tiles) {
#pragma unroll 1
  for (int tile = tiles - 1; tile >= 0; --tile) {
    attend_tile<Traits>(params, shared, acc, tile);
  }
}

template <typename Traits>
__device__ __forceinline__ void attend_block(const SparseAttnParams& params, const Selection& selection, int block,
                                             SharedStorage<Traits>& shared) {
  const KeyRange range = begin_block<Traits>(params, selection, block, shared);
  Accumulators<Traits> acc{};
  attend_tiles(params, shared, acc, (range.last + Traits::kBlockN - 1) / Traits::kBlockN);
  store_rows<Traits>(params, acc.o, acc.rows, shared,
                     static_cast<typename Traits::Element*>(params.out) +
                         (blockIdx.y * params.tokens * params.query_heads + blockIdx.x) * Traits::kHeadDim,
                     params.query_heads * Traits::kHeadDim, nullptr);
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

// ---- Ranged attention

// Finds out which rows the block needs and what they see; returns its number of tiles, and starts on the last.
template <typename Traits>
__device__ __forceinline__ int begin_ranged_block(const SparseAttnParams& params, int block, int rows,
                                                  SharedStorage<Traits>& shared) {
  const RowRanges& from = params.ranges;
  const int head = static_cast<int>(blockIdx.x), batch = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), begin = block * Traits::kBlockM;
  const int queries = static_cast<int>(params.queries);
  const std::int64_t first = batch * params.queries;
  if (thread < Traits::kBlockM) {
    const int row = begin + thread;
    int query = 0;
    int2 range = make_int2(0, 0);
    if (row < rows) {
      query = from.query == nullptr ? row : min(max(from.query[first + row], 0), queries - 1);
      range = from.range[first + row];
    }
    shared.query_token[thread] = static_cast<std::uint32_t>(query);
    shared.ranged.first[thread] = range.x;
    shared.limit[thread] = range.y;
  }
  if (thread == 0) {
    const int kv_head = head / static_cast<int>(params.query_heads / params.kv_heads);
    shared.k_head = head_of<Traits>(params.k, params.k_stride, batch, kv_head);
    shared.v_head = head_of<Traits>(params.v, params.v_stride, batch, kv_head);
    shared.index_row = params.index == nullptr ? nullptr : params.index + batch * params.index_stride[0];
    shared.queries = rows - begin;
    const int groups = (queries + kRowGroup - 1) / kRowGroup;
    int4 all = make_int4(INT_MAX, 0, 0, INT_MAX);
    for (int group = begin / kRowGroup; group < min((begin + Traits::kBlockM) / kRowGroup, groups); ++group) {
      const int4 of_rows = from.group[static_cast<std::int64_t>(batch) * groups + group];
      all = make_int4(min(all.x, of_rows.x), max(all.y, of_rows.y), max(all.z, of_rows.z), min(all.w, of_rows.w));
    }
    shared.seen = all.y;
    shared.ranged.num_sinks = min(from.num_sinks, static_cast<int>(params.tokens));
    shared.ranged.sink_tiles = all.z > 0 ? (shared.ranged.num_sinks + Traits::kBlockN - 1) / Traits::kBlockN : 0;
    shared.ranged.first_tile = all.x < all.y ? all.x / Traits::kBlockN : 0;
    shared.ranged.clear_first = all.z;
    shared.ranged.clear_end = all.w;
  }
  __syncthreads();
  const int last_tile = (shared.seen + Traits::kBlockN - 1) / Traits::kBlockN;
  const int tiles = shared.ranged.sink_tiles + max(last_tile - shared.ranged.first_tile, 0);
  if (tiles > 0) {
    begin_loads(params, shared, tiles - 1);
  }
  return tiles;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    ranged_attn_sm80(const __grid_constant__ SparseAttnParams params) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(memory);
  const int queries = static_cast<int>(params.queries);
  const int rows =
      params.ranges.num_rows == nullptr ? queries : min(max(params.ranges.num_rows[blockIdx.y], 0), queries);
  const int block = static_cast<int>(gridDim.z - 1 - blockIdx.z);  // rows that come later see more
  if (block * Traits::kBlockM >= rows) {
    return;
  }
  const int tiles = begin_ranged_block<Traits>(params, block, rows, shared);
  Accumulators<Traits> acc{};
  attend_tiles(params, shared, acc, tiles);
  const std::int64_t first = blockIdx.y * params.queries * params.query_heads + blockIdx.x;
  store_rows<Traits>(params, acc.o, acc.rows, shared,
                     static_cast<typename Traits::Element*>(params.out) + first * Traits::kHeadDim,
                     params.query_heads * Traits::kHeadDim,
                     params.ranges.lse == nullptr
                         ? nullptr
                         : params.ranges.lse + (blockIdx.y * params.query_heads + blockIdx.x) * params.queries);
}

}  // namespace zipvl::cuda::sparse_attn::sm80
