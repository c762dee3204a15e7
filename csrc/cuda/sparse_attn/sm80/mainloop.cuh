// Tiles of scattered rows into shared memory. kPeriodChunks threads bring a row, each the same chunk of every period,
// so that a thread's places differ by constants.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/shared_address.cuh"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::attn::sm80 {

// An entry of `index` as a token of the sequence, whatever stands there.
__device__ __forceinline__ std::uint32_t token_of(std::int32_t entry, std::uint32_t tokens) {
  return min(static_cast<std::uint32_t>(entry), tokens - 1);
}

// Row r of the tile [kRows, kHeadDim] at shared address `tile` becomes token(r)'s of the head, and 0 from row `valid`
// on; without kPartial every row is valid. stride: of a token, in elements.
template <typename Traits, int kRows, bool kPartial, typename Token>
__device__ __forceinline__ void load_rows(std::uint32_t tile, const typename Traits::Element* head, std::int64_t stride,
                                          int valid, const Token& token) {
  constexpr int kRowsAtOnce = Traits::kThreads / Traits::kPeriodChunks;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0, "a thread's rows share their swizzle");
  const int first = threadIdx.x / Traits::kPeriodChunks, chunk = threadIdx.x % Traits::kPeriodChunks;
  const std::uint32_t target = tile + Traits::offset(first, chunk);
  constexpr int kOwnRows = kRows / kRowsAtOnce;
  const char* own_chunk = reinterpret_cast<const char*>(head) + chunk * kChunkBytes;
  const char* source[kOwnRows];
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    source[i] = own_chunk + 2 * (token(first + i * kRowsAtOnce) * static_cast<std::uint64_t>(stride));
  }
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
    for (int byte = 0; byte < Traits::kRowBytes; byte += Traits::kPeriodChunks * kChunkBytes) {
      const std::uint32_t place = target + i * kRowsAtOnce * Traits::kRowBytes + byte;
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

// Starts on the index entries of a tile of keys; those nobody sees are not read.
template <typename Traits>
__device__ __forceinline__ void load_index(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  const int thread = static_cast<int>(threadIdx.x), key = tile * Traits::kBlockN + thread;
  if (thread < Traits::kBlockN && key < shared.seen) {
    ptx::cp_async_4(ptx::shared_address(&shared.index[tile % 2][thread]),
                    shared.index_row + key * params.index_stride[1]);
  }
}

// Starts on the rows of a tile of keys whose index entries are here. kPartial: rows that nobody sees are 0.
template <typename Traits, bool kPartial>
__device__ __forceinline__ void load_keys(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  const std::int32_t* index = shared.index[tile % 2];
  load_rows<Traits, Traits::kBlockN, kPartial>(
      ptx::shared_address(shared.k[tile % Traits::kStages]), shared.k_head, params.k_stride[2],
      kPartial ? shared.seen - tile * Traits::kBlockN : 0,
      [&](int row) { return token_of(index[row], static_cast<std::uint32_t>(params.tokens)); });
}

template <typename Traits, bool kPartial>
__device__ __forceinline__ void load_values(const SparseAttnParams& params, SharedStorage<Traits>& shared, int tile) {
  const std::int32_t* index = shared.index[tile % 2];
  load_rows<Traits, Traits::kBlockN, kPartial>(
      ptx::shared_address(shared.v[tile % Traits::kStages]), shared.v_head, params.v_stride[2],
      kPartial ? shared.seen - tile * Traits::kBlockN : 0,
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

}  // namespace zipvl::cuda::attn::sm80
