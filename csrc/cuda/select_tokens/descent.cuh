// The descent: the key at which the weights of a row's keys, from the highest down, reach a sum.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/load.cuh"
#include "cuda/select_tokens/search.cuh"

namespace zipvl::cuda::select {

// The first level: counts the block's keys, and what is known of its tokens, into the bins. `masses`: the budget's too.
template <int kItems>
__device__ void add_first(const Keys<kItems>& keys, const Seen& seen, bool masses, MassBins* mass, Shared& shared) {
  constexpr int kCopies = kItems / 8;
  const int lane = threadIdx.x % 32;
  std::uint32_t lowest = 0xFFFFFFFFU, highest = 0, rank_lowest = 0xFFFFFFFFU, rank_highest = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    lowest = min(lowest, keys.budget[i]);
    highest = max(highest, keys.budget[i]);
    rank_lowest = min(rank_lowest, keys.rank[i]);
    rank_highest = max(rank_highest, keys.rank[i]);
  }
  lowest = __reduce_min_sync(kAllLanes, lowest);
  highest = __reduce_max_sync(kAllLanes, highest);
  rank_lowest = __reduce_min_sync(kAllLanes, rank_lowest);
  rank_highest = __reduce_max_sync(kAllLanes, rank_highest);
  const std::uint32_t flags = __reduce_or_sync(kAllLanes, seen.flags);
  const std::uint32_t real = __reduce_add_sync(kAllLanes, seen.real);
  if (lane <= kRealBin - kNotFiniteBin) {
    const std::uint32_t counted = lane == kRealBin - kNotFiniteBin ? real : flags >> lane & 1U;
    if (counted != 0) {
      atomicAdd(&shared.rank[kNotFiniteBin + lane], counted);
    }
  }
  if (masses) {
    if (lowest != highest) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (keys.budget[i] != 0) {
          atomicAdd(&mass[i % kCopies].count[keys.budget[i] >> kFirstShift], 1U);
          atomicAdd(&mass[i % kCopies].low[keys.budget[i] >> kFirstShift], keys.budget[i] & kFirstSpan);
        }
      }
    } else if (highest != 0 && lane < kCopies) {  // ties are common and would all meet in one address
      atomicAdd(&mass[lane].count[highest >> kFirstShift], 256U);
      atomicAdd(&mass[lane].low[highest >> kFirstShift], 256U * (highest & kFirstSpan));
    }
  }
  if (rank_lowest != rank_highest) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (keys.rank[i] > kRankZero + kFirstSpan) {  // bin 0 has the others
        atomicAdd(&shared.rank[(keys.rank[i] - kRankZero) >> kFirstShift], 1U);
      }
    }
  } else if (rank_highest > kRankZero + kFirstSpan && lane == 0) {
    atomicAdd(&shared.rank[(rank_highest - kRankZero) >> kFirstShift], 32U * kItems);
  }
}

// A further level: the keys of the cut's range, `shift` bits a bin.
template <bool kMass>
__device__ void add_key(std::uint32_t key, const Cut& cut, int shift, MassBins* mass, Shared& shared) {
  const std::uint32_t offset = key - cut.lo;
  if (offset > cut.span) {
    return;
  }
  if constexpr (kMass) {
    atomicAdd(&mass->count[offset >> shift], 1U);
    atomicAdd(&mass->low[offset >> shift], offset & ((1U << shift) - 1U));
  } else {
    atomicAdd(&shared.rank[offset >> shift], 1U);
  }
}

__device__ inline int shift_of(const Cut& cut) { return max(0, 32 - __clz(cut.span) - kBinBits); }

// Narrows the cut to one key: level by level over the block's keys while they are many, then over a list of all blocks'
// candidates, which saves meetings, and once those are few by comparing each with each. A block alone meets nobody, and
// lists no more than it compares: its threads list one after the other. The bins are empty before, and after.
template <bool kMass, int kItems, typename Team>
__device__ Cut resolve(Team& team, const std::uint32_t (&keys)[kItems], Cut cut, MassBins* mass, Shared& shared) {
  const std::uint32_t max_listed = team.size() > 1 ? kMaxListed : kMaxPaired;
  while (cut.span > 0 && cut.inside > max_listed) {
    const int shift = shift_of(cut);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      add_key<kMass>(keys[i], cut, shift, mass, shared);
    }
    const Four four = team.template merge<kMass, !kMass>(mass, shared);
    cut = search<kMass>(four, cut, shift, shared);
  }
  if (cut.span == 0) {
    return cut;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (keys[i] - cut.lo <= cut.span) {
      shared.list[atomicAdd(&shared.listed, 1)] = keys[i];
    }
  }
  const int listed = static_cast<int>(cut.inside);
  team.gather_list(shared, listed);
  const std::uint32_t* few = shared.list;
  if (cut.inside > kMaxPaired) {
    while (cut.span > 0 && cut.inside > kMaxPaired) {
      const int shift = shift_of(cut);
#pragma unroll 1
      for (int i = threadIdx.x; i < listed; i += kThreads) {
        add_key<kMass>(shared.list[i], cut, shift, mass, shared);
      }
      __syncthreads();
      cut = search<kMass>(take_bins<kMass, !kMass, 1>(mass, shared), cut, shift, shared);
    }
    if (cut.span > 0) {
#pragma unroll 1
      for (int i = threadIdx.x; i < listed; i += kThreads) {
        if (shared.list[i] - cut.lo <= cut.span) {
          shared.pairs[atomicAdd(&shared.paired, 1)] = shared.list[i];
        }
      }
      __syncthreads();
      few = shared.pairs;
    }
  }
  if (cut.span > 0) {
    cut = search_pairs<kMass>(few, cut, shared);
  }
  if (threadIdx.x == 0) {
    shared.listed = shared.paired = 0;
  }
  return cut;
}

}  // namespace zipvl::cuda::select
