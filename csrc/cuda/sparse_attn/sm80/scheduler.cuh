// Which block does what. The grid is sized for every token selected; `count`, read on the device, says how many blocks
// have queries, longest first, and the others write the zeros of tokens outside the selection, where they are wanted.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm80 {

// An entry of `index` as a token of the sequence, whatever stands there.
__device__ __forceinline__ std::uint32_t token_of(std::int32_t entry, std::uint32_t tokens) {
  return min(static_cast<std::uint32_t>(entry), tokens - 1);
}

// The selection of a batch row.
struct Selection {
  const std::int32_t* index;
  std::int64_t stride;
  int count;  // in [0, tokens], whatever stands in the tensor
  std::uint32_t tokens;

  __device__ __forceinline__ Selection(const SparseAttnParams& params, int batch)
      : index(params.index + batch * params.index_stride[0]),
        stride(params.index_stride[1]),
        count(static_cast<int>(
            min(max(static_cast<std::int64_t>(params.count[batch * params.count_stride]), std::int64_t{0}),
                params.tokens))),
        tokens(static_cast<std::uint32_t>(params.tokens)) {}

  __device__ __forceinline__ const std::int32_t* place(int i) const { return index + i * stride; }
  __device__ __forceinline__ std::uint32_t token(int i) const { return token_of(__ldg(place(i)), tokens); }

  // How many selected tokens are at or before `last`, for the whole warp: 32 probes a round.
  __device__ __forceinline__ int seen_by(int last) const {
    int low = 0, high = count;
    while (low < high) {
      const int step = (high - low + kWarpThreads - 1) / kWarpThreads;
      const int probe = low + static_cast<int>(threadIdx.x % kWarpThreads) * step + step - 1;
      const bool before = probe < high && __ldg(place(probe)) <= last;
      low += __popc(__ballot_sync(kAllLanes, before)) * step;
      high = min(low + step - 1, high);
    }
    return low;
  }

  // The same for this thread alone, where the answer is known to lie in [low, high].
  __device__ __forceinline__ int seen_by(int last, int low, int high) const {
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (__ldg(place(middle)) <= last) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// One of `of` equal shares of the work on zeros, or the block of queries `number`.
struct Job {
  bool attends;
  int number, of;
};

// blockIdx: query head, batch row, place in the row's order. The first wave of blocks has queries; after it blocks
// without stand evenly among those with, so that their stores run beside the products.
template <typename Traits>
__device__ __forceinline__ Job job_of(const SparseAttnParams& params, const Selection& selection, int first_wave) {
  const int places = static_cast<int>(gridDim.z), place = static_cast<int>(blockIdx.z);
  if (params.all_queries) {
    return {true, places - 1 - place, places};
  }
  const int blocks = (selection.count + Traits::kBlockM - 1) / Traits::kBlockM;
  const int ahead = min(blocks, first_wave);
  const auto blocks_before = [&](int n) {
    const std::int64_t later = static_cast<std::int64_t>(max(n - ahead, 0)) * (blocks - ahead);
    return min(n, ahead) + static_cast<int>((later + places - ahead - 1) / (places - ahead));
  };
  const int before = blocks_before(place);
  if (blocks_before(place + 1) > before) {
    return {true, blocks - 1 - before, blocks};
  }
  const int heads = static_cast<int>(gridDim.x);
  return {false, (place - before) * heads + static_cast<int>(blockIdx.x), (places - blocks) * heads};
}

__device__ __forceinline__ int query_rows(const SparseAttnParams& params, const Selection& selection) {
  return params.all_queries ? static_cast<int>(selection.tokens) : selection.count;
}

// How many packed keys the queries of a block see: its first row and its last.
struct KeyRange {
  int first, last;
};

template <typename Traits>
__device__ __forceinline__ KeyRange keys_seen(const SparseAttnParams& params, const Selection& selection, int block) {
  if (!params.causal) {
    return {selection.count, selection.count};
  }
  const int begin = block * Traits::kBlockM;
  if (!params.all_queries) {
    return {begin + 1, min(begin + Traits::kBlockM, selection.count)};
  }
  const int first = selection.seen_by(begin);
  const int last = selection.seen_by(min(begin + Traits::kBlockM, static_cast<int>(selection.tokens)) - 1);
  return {first, max(first, last)};
}

// Keys seen by query row `row` of the sequence (all_queries) or of the selection.
__device__ __forceinline__ int keys_seen_by(const SparseAttnParams& params, const Selection& selection,
                                            const KeyRange& range, int row) {
  if (!params.causal) {
    return range.last;
  }
  return params.all_queries ? selection.seen_by(row, range.first, range.last) : min(row + 1, range.last);
}

}  // namespace zipvl::cuda::sparse_attn::sm80
