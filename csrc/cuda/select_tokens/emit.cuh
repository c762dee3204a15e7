// The row of index: the selected positions in ascending order, and behind them the end.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/load.cuh"

namespace zipvl::cuda::select {

struct Tally {  // tokens above and at a cut
  int above, equal;
  int unused[2];
};

// Writes the row of index: tokens above the cut, and the first `ties` at it.
template <int kItems, typename Team>
__device__ void emit(Team& team, std::int64_t b, const Keys<kItems>& keys, int first, std::uint32_t cut, int ties,
                     int count, const SelectTokensParams& params, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Two quads at once: tokens above and at the cut of the first in the low bytes, of the second in the high ones. A
  // warp's sums are at most 128.
  constexpr int kPairs = kItems / 8;
  std::uint32_t before[kPairs], sums[kPairs], mine = 0;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    std::uint32_t counts = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t key = keys.rank[8 * pair + i];
      counts += key > cut ? 1U << (i / 4 * 16) : key == cut ? 256U << (i / 4 * 16) : 0U;
    }
    std::uint32_t through = counts;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const std::uint32_t lower = __shfl_up_sync(kAllLanes, through, delta);
      through += lane >= delta ? lower : 0;
    }
    before[pair] = through - counts;
    sums[pair] = __shfl_sync(kAllLanes, through, 31);
    // Above in the low half, equal in the high one: at most 16,384 in a block.
    mine += (sums[pair] & 0xFFU) + (sums[pair] >> 16 & 0xFFU);
    mine += (sums[pair] & 0xFF00U) << 8;
    mine += sums[pair] >> 24 << 16;
  }
  if (lane == 0) {
    shared.tallies[warp] = mine;
  }
  __syncthreads();
  const std::uint32_t of_warp = lane < kWarps ? shared.tallies[lane] : 0;
  const std::uint32_t warps_before = __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
  Tally sum{};
  if (team.size() > 1) {
    const std::uint32_t of_block = __reduce_add_sync(kAllLanes, of_warp);
    team.gather(1, Tally{static_cast<int>(of_block & 0xFFFFU), static_cast<int>(of_block >> 16), {}}, team.rank(),
                [&sum](const Tally& other) {
                  sum.above += other.above;
                  sum.equal += other.equal;
                });
  }
  int above_before = sum.above + static_cast<int>(warps_before & 0xFFFFU);
  int equal_before = sum.equal + static_cast<int>(warps_before >> 16);
  std::int32_t* index = params.index + b * params.tokens;
  const bool vectors = reinterpret_cast<std::uintptr_t>(index) % 16 == 0;
#pragma unroll
  for (int quad = 0; quad < kItems / 4; ++quad) {
    const int n = first + Keys<kItems>::place(quad), shift = quad % 2 * 16;
    int above = above_before + static_cast<int>(before[quad / 2] >> shift & 0xFFU);
    int equal = equal_before + static_cast<int>(before[quad / 2] >> (shift + 8) & 0xFFU);
    above_before += static_cast<int>(sums[quad / 2] >> shift & 0xFFU);
    equal_before += static_cast<int>(sums[quad / 2] >> (shift + 8) & 0xFFU);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const std::uint32_t key = keys.rank[4 * quad + c];
      if (key > cut || (key == cut && equal < ties)) {
        index[above + min(equal, ties)] = n + c;
      }
      above += key > cut ? 1 : 0;
      equal += key == cut ? 1 : 0;
    }
    if (vectors && n >= count && n + 3 < params.tokens) {
      *reinterpret_cast<int4*>(index + n) = int4{params.tokens, params.tokens, params.tokens, params.tokens};
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (n + c >= count && n + c < params.tokens) {
          index[n + c] = params.tokens;
        }
      }
    }
  }
  if (team.rank() == 0 && threadIdx.x == 0) {
    params.count[b] = count;
  }
}

}  // namespace zipvl::cuda::select
