// One tile of keys in the loop of a block: its rows gathered by cp.async, the two products on mma.sync, and between
// them the online softmax (Milakov and Gimelshein, arXiv 1805.02867).
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm80/scheduler.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm80 {

// ---- Loads: tiles of scattered rows into shared memory. kPeriodPieces threads bring a row, each the same piece of
// every period, so that a thread's places differ by constants.

// Row r of the tile [kRows, kHeadDim] at shared address `tile` becomes token(r)'s of the head, and 0 from row `valid`
// on; without kPartial every row is valid. stride: of a token, in elements.
template <typename Traits, int kRows, bool kPartial, typename Token>
__device__ __forceinline__ void load_rows(std::uint32_t tile, const typename Traits::Element* head, std::int64_t stride,
                                          int valid, const Token& token) {
  using Rows = typename Traits::Rows;
  constexpr int kRowsAtOnce = Traits::kThreads / Rows::kPeriodPieces;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0, "a thread's rows share their swizzle");
  // In ranged attention registers are so short that this is found anew at every use.
  const unsigned thread = Traits::kRanged ? ptx::opaque(static_cast<int>(threadIdx.x)) : threadIdx.x;
  const int first = thread / Rows::kPeriodPieces, piece = thread % Rows::kPeriodPieces;
  const std::uint32_t target = tile + Rows::offset(first, piece);
  constexpr int kOwnRows = kRows / kRowsAtOnce;
  const char* own_piece = reinterpret_cast<const char*>(head) + piece * kPieceBytes;
  const char* source[kOwnRows];
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    source[i] = own_piece + 2 * (token(first + i * kRowsAtOnce) * static_cast<std::uint64_t>(stride));
  }
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
    for (int byte = 0; byte < Rows::kRowBytes; byte += Rows::kPeriodBytes) {
      const std::uint32_t place = target + i * kRowsAtOnce * Rows::kRowBytes + byte;
      if constexpr (kPartial) {
        ptx::cp_async_16(place, source[i] + byte, i * kRowsAtOnce < valid - first);
      } else {
        ptx::cp_async_16(place, source[i] + byte);
      }
    }
  }
}

template <typename Traits>
__device__ __forceinline__ const typename Traits::Element* head_of(const void* data, const std::int64_t (&stride)[3],
                                                                   std::int64_t batch, std::int64_t head) {
  return static_cast<const typename Traits::Element*>(data) + batch * stride[0] + head * stride[1];
}

// The tile of the list of keys that a tile of the walk is.
template <typename Traits>
__device__ __forceinline__ int list_tile(const SharedStorage<Traits>& shared, int tile) {
  if constexpr (Traits::kRanged) {
    return tile < shared.ranged.sink_tiles ? tile : tile - shared.ranged.sink_tiles + shared.ranged.first_tile;
  } else {
    return tile;
  }
}

// How many keys of the list some row sees, those of the tile included.
template <typename Traits>
__device__ __forceinline__ int keys_up_to(const SharedStorage<Traits>& shared, int tile) {
  if constexpr (Traits::kRanged) {
    return tile < shared.ranged.sink_tiles ? shared.ranged.num_sinks : shared.seen;
  } else {
    return shared.seen;
  }
}

// Starts on the index entries of a tile of keys; those nobody sees are not read.
template <typename Traits>
__device__ __forceinline__ void load_index(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  const int thread = static_cast<int>(threadIdx.x), key = list_tile(shared, tile) * Traits::kBlockN + thread;
  if (thread < Traits::kBlockN && key < keys_up_to(shared, tile)) {
    if (Traits::kRanged && shared.index_row == nullptr) {  // the list is all tokens
      shared.index[tile % 2][thread] = key;
    } else {
      ptx::cp_async_4(ptx::shared_address(&shared.index[tile % 2][thread]),
                      shared.index_row + key * params.index_stride[1]);
    }
  }
}

// Starts on the rows of a tile of keys whose index entries are here. kPartial: rows that nobody sees are 0.
template <typename Traits, bool kPartial>
__device__ __forceinline__ void load_keys(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  constexpr bool kChecked = kPartial || Traits::kRanged;
  const std::int32_t* index = shared.index[tile % 2];
  load_rows<Traits, Traits::kBlockN, kChecked>(
      ptx::shared_address(shared.k[tile % Traits::kStages]), shared.k_head, params.k_stride[2],
      kChecked ? keys_up_to(shared, tile) - list_tile(shared, tile) * Traits::kBlockN : 0,
      [&](int row) { return token_of(index[row], static_cast<std::uint32_t>(params.tokens)); });
}

template <typename Traits, bool kPartial>
__device__ __forceinline__ void load_values(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  constexpr bool kChecked = kPartial || Traits::kRanged;
  const std::int32_t* index = shared.index[tile % 2];
  load_rows<Traits, Traits::kBlockN, kChecked>(
      ptx::shared_address(shared.v[tile % Traits::kStages]), shared.v_head, params.v_stride[2],
      kChecked ? keys_up_to(shared, tile) - list_tile(shared, tile) * Traits::kBlockN : 0,
      [&](int row) { return token_of(index[row], static_cast<std::uint32_t>(params.tokens)); });
}

// Copies that start once a tile's K is here and no warp needs the tile after it: those of a whole tile ahead, or with
// one stage this tile's V.
template <typename Traits>
__device__ __forceinline__ void load_during_scores(const SparseAttnParams& params, SharedStorage<Traits>& shared,
                                                   int tile) {
  if constexpr (Traits::kStages == 1) {
    load_values<Traits, true>(params, shared, tile);
    if (tile > 0) {
      load_index(params, shared, tile - 1);
    }
  } else if (tile > 0) {
    load_keys<Traits, false>(params, shared, tile - 1);
    load_values<Traits, false>(params, shared, tile - 1);
    if (tile > 1) {
      load_index(params, shared, tile - 2);
    }
  }
  ptx::cp_async_commit();
}

// With one stage: waits for this tile's V, and starts on the K of the tile before.
template <typename Traits>
__device__ __forceinline__ void load_after_scores(const SparseAttnParams& params, SharedStorage<Traits>& shared,
                                                  int tile) {
  if constexpr (Traits::kStages == 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is here, and no warp needs this K
    if (tile > 0) {
      load_keys<Traits, false>(params, shared, tile - 1);
    }
    ptx::cp_async_commit();
  }
}

// Starts on the first tile of the walk, whose index entries are here.
template <typename Traits>
__device__ __forceinline__ void load_first(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  load_keys<Traits, true>(params, shared, tile);
  if constexpr (Traits::kStages == 2) {
    load_values<Traits, true>(params, shared, tile);
    if (tile > 0) {
      load_index(params, shared, tile - 1);
    }
  }
  ptx::cp_async_commit();
}

// ---- Online softmax over a warp's score tiles, in registers. Of every 16-row tile a thread holds parts of two rows, 8
// apart; the four lanes of a quad share a row.

// The rows of a thread: [16-row tile][row, row + 8].
template <int kRowTiles>
struct RowState {
  // Of the scores so far times scale_log2; what weights are relative to. Not -inf while nothing is seen, because that
  // less itself is NaN.
  float max[kRowTiles][2];
  float sum[kRowTiles][2];  // of this thread's weights

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max[m][i] = -1e38F;
        sum[m][i] = 0.0F;
      }
    }
  }
};

// Scores of packed keys from `first_column` on: -inf where the row does not see the key. limit: keys seen by the warp's
// rows.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void apply_mask(float (&s)[kRowTiles][kColumnTiles][4], const int* limit, int first_column) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  const int column = first_column + 2 * (lane % 4);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int left = limit[m * 16 + i * 8 + lane / 4] - column;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * j + c >= left) {
            s[m][j][2 * i + c] = -INFINITY;
          }
        }
      }
    }
  }
}

// The same of ranged attention: -inf before places `first` and from places `limit` on; sinks: [0, min(first, sinks)).
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void apply_mask(float (&s)[kRowTiles][kColumnTiles][4], const int* first, const int* limit,
                                           int sinks, int first_column) {
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  const int column = first_column + 2 * (lane % 4);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m * 16 + i * 8 + lane / 4;
      const int begin = (sinks > 0 ? 0 : first[row]) - column;
      const int end = (sinks > 0 ? min(first[row], sinks) : limit[row]) - column;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (static_cast<unsigned>(8 * j + c - begin) >= static_cast<unsigned>(end - begin)) {
            s[m][j][2 * i + c] = -INFINITY;
          }
        }
      }
    }
  }
}

// The maxima of row tile m take in its scores. rescale: what sums and outputs so far must be multiplied by.
template <int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void update_max(const float (&s)[kRowTiles][kColumnTiles][4], RowState<kRowTiles>& rows,
                                           float (&rescale)[2], int m, float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max = s[m][0][2 * i];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      max = fmaxf(max, fmaxf(s[m][j][2 * i], s[m][j][2 * i + 1]));
    }
    max = fmaxf(rows.max[m][i], quad_max(max) * scale_log2);
    rescale[i] = ptx::exp2(rows.max[m][i] - max);
    rows.max[m][i] = max;
  }
}

// The maximum seldom moves after the first tiles: a warp in which none did skips the multiplications.
template <int kRowTiles, int kOutputTiles>
__device__ __forceinline__ void rescale_o(float (&o)[kRowTiles][kOutputTiles][4], RowState<kRowTiles>& rows,
                                          const float (&rescale)[2], int m) {
  if (__any_sync(kAllLanes, rescale[0] != 1.0F || rescale[1] != 1.0F)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.sum[m][i] *= rescale[i];
#pragma unroll
      for (int j = 0; j < kOutputTiles; ++j) {
        o[m][j][2 * i] *= rescale[i];
        o[m][j][2 * i + 1] *= rescale[i];
      }
    }
  }
}

// Weights exp2(scale_log2 * score - max) of columns 16 * n to 16 * n + 15, as the A operand of the second product; the
// sums take them in.
template <typename Element, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void scale_apply_exp2(std::uint32_t (&p)[kRowTiles][4],
                                                 const float (&s)[kRowTiles][kColumnTiles][4], int n,
                                                 RowState<kRowTiles>& rows, float scale_log2) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const float (&pair)[4] = s[m][2 * n + f / 2];
      const int i = f % 2;
      const float low = ptx::exp2(fmaf(pair[2 * i], scale_log2, -rows.max[m][i]));
      const float high = ptx::exp2(fmaf(pair[2 * i + 1], scale_log2, -rows.max[m][i]));
      rows.sum[m][i] += low + high;
      p[m][f] = pack_pair<Element>(low, high);
    }
  }
}

// ---- Products: S = Q K^T of the warp's query rows and a tile of keys, and O += P V.

// Accumulators of a warp: [row tile][8-column tile][as mma_16x8x16's C].
template <typename Traits>
using Scores = float[Traits::kRowTiles][Traits::kBlockN / 8][4];
template <typename Traits>
using Output = float[Traits::kRowTiles][Traits::kHeadDim / 8][4];

// Shared addresses from which this lane reads its share of a warp's operands.
struct Operands {
  std::uint32_t q, k, v;

  template <typename Traits>
  __device__ __forceinline__ static Operands of(const SharedStorage<Traits>& shared, int tile) {
    using Rows = typename Traits::Rows;
    const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
    // ldmatrix: lanes 0-7 name the rows of the first matrix, and so on. K's rows are the product's columns, so its four
    // matrices are (columns 0-7, then 8-15) x (two pieces); Q's and V's go down the rows first.
    return {
        ptx::shared_address(shared.q) + Rows::offset(warp * 16 * Traits::kRowTiles + lane % 16, lane / 16),
        ptx::shared_address(shared.k[tile % Traits::kStages]) + Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2),
        ptx::shared_address(shared.v[tile % Traits::kStages]) + Rows::offset(lane % 16, lane / 16)};
  }
};

template <typename Traits>
__device__ __forceinline__ void mma_qk(Scores<Traits>& s, const Operands& at) {
  using Rows = typename Traits::Rows;
  constexpr int kTileBytes = 16 * Rows::kRowBytes;
#pragma unroll Traits::kPeriodsAtOnce
  for (int byte = 0; byte < Rows::kRowBytes; byte += Rows::kPeriodBytes) {
#pragma unroll
    for (int step = 0; step < Rows::kPeriodPieces / 2; ++step) {
      std::uint32_t q[Traits::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ptx::ldmatrix(q[m], Rows::advance(at.q, step) + byte + m * kTileBytes);
      }
#pragma unroll
      for (int n = 0; n < Traits::kBlockN / 16; ++n) {
        std::uint32_t k[4];
        ptx::ldmatrix(k, Rows::advance(at.k, step) + byte + n * kTileBytes);
#pragma unroll
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          ptx::mma_16x8x16<typename Traits::Element>(s[m][2 * n], q[m], k[0], k[1]);
          ptx::mma_16x8x16<typename Traits::Element>(s[m][2 * n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }
}

// Scores become weights 16 columns at a time, so that exponentials and products of different columns can run at once.
template <typename Traits>
__device__ __forceinline__ void mma_pv(Output<Traits>& o, const Scores<Traits>& s, RowState<Traits::kRowTiles>& rows,
                                       float scale_log2, const Operands& at) {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  constexpr int kTileBytes = 16 * Rows::kRowBytes;
#pragma unroll
  for (int n = 0; n < Traits::kBlockN / 16; ++n) {
    std::uint32_t p[Traits::kRowTiles][4];
    scale_apply_exp2<Element>(p, s, n, rows, scale_log2);
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      std::uint32_t v[4];
      ptx::ldmatrix_trans(v, Rows::advance(at.v, step) + n * kTileBytes);
#pragma unroll
      for (int m = 0; m < Traits::kRowTiles; ++m) {
        ptx::mma_16x8x16<Element>(o[m][2 * step], p[m], v[0], v[1]);
        ptx::mma_16x8x16<Element>(o[m][2 * step + 1], p[m], v[2], v[3]);
      }
    }
  }
}

}  // namespace zipvl::cuda::sparse_attn::sm80
