// The radix select: the key at which the weights of a row's keys, from the highest down, reach a sum. Digit by digit,
// the most significant first, a histogram says in which bucket that is; keys of the last few candidates are compared.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/histogram.cuh"
#include "cuda/select_tokens/keys.cuh"

namespace zipvl::cuda::select_tokens {

// 24 bits; keys of one exponent differ by as much as their masses.
__device__ inline std::uint32_t mass_of(std::uint32_t key) {
  return (key & 0x7FFFFFU) | (key >= 0x800000U ? 0x800000U : 0U);
}

struct ExclusiveSum {
  std::uint64_t mass, mass_total;  // of the threads before this one; of all
  std::uint32_t count;
};

// Sums over the threads before this one. kMass: else `mass` is 0 throughout.
template <bool kMass>
__device__ ExclusiveSum exclusive_sum(std::uint64_t mass, std::uint32_t count, BlockScan& scan) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  std::uint64_t masses = mass;
  std::uint32_t counts = count;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const std::uint32_t lower = __shfl_up_sync(kAllLanes, counts, delta);
    counts += lane >= delta ? lower : 0;
    if constexpr (kMass) {
      const std::uint64_t lower_mass = __shfl_up_sync(kAllLanes, masses, delta);
      masses += lane >= delta ? lower_mass : 0;
    }
  }
  if (lane == 31) {
    scan.count[warp] = counts;
    scan.mass[warp] = masses;
  }
  __syncthreads();
  ExclusiveSum prefix{masses - mass, 0, counts - count};
  prefix.count += __reduce_add_sync(kAllLanes, lane < warp ? scan.count[lane] : 0);
  if constexpr (kMass) {
    std::uint64_t sums = scan.mass[lane % kWarps];
#pragma unroll
    for (int delta = 1; delta < kWarps; delta *= 2) {
      const std::uint64_t lower = __shfl_up_sync(kAllLanes, sums, delta);
      sums += lane >= delta ? lower : 0;
    }
    const std::uint64_t before = __shfl_sync(kAllLanes, sums, max(warp - 1, 0));
    prefix.mass += warp > 0 ? before : 0;
    prefix.mass_total = __shfl_sync(kAllLanes, sums, kWarps - 1);
  }
  return prefix;
}

// One more digit: the four buckets' keys begin at threshold.lo + (bucket << shift). Returns the bucket of the
// threshold.
template <bool kMass>
__device__ ThresholdBucket find_threshold(const ThreadBuckets& buckets, const ThresholdBucket& threshold, int shift,
                                          Shared& shared) {
  const std::uint32_t first = threshold.lo + (static_cast<std::uint32_t>(bucket_quad() * kBucketsPerThread) << shift);
  std::uint64_t mass[kBucketsPerThread], masses = 0;
  std::uint32_t count[kBucketsPerThread], counts = 0;
#pragma unroll
  for (int i = 0; i < kBucketsPerThread; ++i) {
    count[i] = kMass ? buckets.count[i] : buckets.rank[i];
    mass[i] = kMass ? std::uint64_t{count[i]} * mass_of(first + (i << shift)) + buckets.low[i] : count[i];
    masses += mass[i];
    counts += count[i];
  }
  const ExclusiveSum prefix = exclusive_sum<kMass>(masses, counts, shared.scan);
  std::uint64_t before = kMass ? prefix.mass : prefix.count;
  std::uint32_t above = threshold.above + prefix.count;
  if (before < threshold.need && threshold.need <= before + masses) {
#pragma unroll
    for (int i = kBucketsPerThread - 1; i >= 0; --i) {
      if (before < threshold.need && threshold.need <= before + mass[i]) {
        const std::uint32_t lo = first + (i << shift);
        shared.threshold = {threshold.need - before, lo, min((1U << shift) - 1U, threshold.lo + threshold.span - lo),
                            above, count[i]};
      }
      before += mass[i];
      above += count[i];
    }
  }
  __syncthreads();
  return shared.threshold;
}

// The key itself, among the at most kMaxCompared keys of the threshold bucket; four threads compare one with all.
template <bool kMass>
__device__ ThresholdBucket find_threshold_by_comparison(const std::uint32_t* keys, const ThresholdBucket& threshold,
                                                        Shared& shared) {
  const int i = static_cast<int>(threadIdx.x) / 4, keys_inside = static_cast<int>(threshold.inside);
  if (static_cast<int>(threadIdx.x) / kWarpThreads * 8 < keys_inside) {  // whole warps
    const std::uint32_t mine = keys[min(i, keys_inside - 1)];
    std::uint32_t mass = 0, greater = 0, equal = 0, equal_before = 0;  // kMaxCompared masses of 24 bits
#pragma unroll 4
    for (int j = static_cast<int>(threadIdx.x) % 4; j < keys_inside; j += 4) {
      const std::uint32_t key = keys[j];
      greater += key > mine ? 1U : 0U;
      equal += key == mine ? 1U : 0U;
      equal_before += key == mine && j < i ? 1U : 0U;
      if constexpr (kMass) {
        mass += key > mine ? mass_of(key) : 0U;
      }
    }
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      greater += __shfl_xor_sync(kAllLanes, greater, other);
      equal += __shfl_xor_sync(kAllLanes, equal, other);
      equal_before += __shfl_xor_sync(kAllLanes, equal_before, other);
      if constexpr (kMass) {
        mass += __shfl_xor_sync(kAllLanes, mass, other);
      }
    }
    const std::uint64_t before = kMass ? mass : greater;
    const std::uint64_t through = before + std::uint64_t{equal} * (kMass ? mass_of(mine) : 1U);
    if (i < keys_inside && threadIdx.x % 4 == 0 && equal_before == 0 && before < threshold.need &&
        threshold.need <= through) {
      shared.threshold = {threshold.need - before, mine, 0, threshold.above + greater, equal};
    }
  }
  __syncthreads();
  return shared.threshold;
}

// The top digit: counts the block's keys, and what is known of its tokens, into the buckets. `masses`: the budget's
// too.
template <int kItems>
__device__ void count_top_digit(const Keys<kItems>& keys, const LaneSummary& lane_summary, bool masses,
                                MassHistogram* mass, Shared& shared) {
  constexpr int kCopies = kItems / 8;
  const int lane = threadIdx.x % kWarpThreads;
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
  const std::uint32_t flags = __reduce_or_sync(kAllLanes, lane_summary.flags);
  const std::uint32_t real = __reduce_add_sync(kAllLanes, lane_summary.real);
  if (lane <= kRealBucket - kNotFiniteBucket) {
    const std::uint32_t counted = lane == kRealBucket - kNotFiniteBucket ? real : flags >> lane & 1U;
    if (counted != 0) {
      atomicAdd(&shared.rank[kNotFiniteBucket + lane], counted);
    }
  }
  if (masses) {
    if (lowest != highest) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (keys.budget[i] != 0) {
          atomicAdd(&mass[i % kCopies].count[keys.budget[i] >> kTopDigitShift], 1U);
          atomicAdd(&mass[i % kCopies].low[keys.budget[i] >> kTopDigitShift], keys.budget[i] & kTopBucketSpan);
        }
      }
    } else if (highest != 0 && lane < kCopies) {  // ties are common and would all be added at one address
      atomicAdd(&mass[lane].count[highest >> kTopDigitShift], 256U);
      atomicAdd(&mass[lane].low[highest >> kTopDigitShift], 256U * (highest & kTopBucketSpan));
    }
  }
  if (rank_lowest != rank_highest) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (keys.rank[i] > kRankZero + kTopBucketSpan) {  // bucket 0 has the others
        atomicAdd(&shared.rank[(keys.rank[i] - kRankZero) >> kTopDigitShift], 1U);
      }
    }
  } else if (rank_highest > kRankZero + kTopBucketSpan && lane == 0) {
    atomicAdd(&shared.rank[(rank_highest - kRankZero) >> kTopDigitShift], 32U * kItems);
  }
}

// A further digit: counts a key of the threshold bucket, 2**shift keys a bucket.
template <bool kMass>
__device__ void count_digit(std::uint32_t key, const ThresholdBucket& threshold, int shift, MassHistogram* mass,
                            Shared& shared) {
  const std::uint32_t offset = key - threshold.lo;
  if (offset > threshold.span) {
    return;
  }
  if constexpr (kMass) {
    atomicAdd(&mass->count[offset >> shift], 1U);
    atomicAdd(&mass->low[offset >> shift], offset & ((1U << shift) - 1U));
  } else {
    atomicAdd(&shared.rank[offset >> shift], 1U);
  }
}

__device__ inline int digit_shift(const ThresholdBucket& threshold) {
  return max(0, 32 - __clz(threshold.span) - kDigitBits);
}

// Narrows the threshold bucket to one key: digit by digit over the block's keys while they are many, then over a list
// of all blocks' candidates, which saves exchanges, and once those are few by comparing each with each. A block alone
// exchanges nothing, and lists no more than it compares: its threads list one after the other. The histograms are empty
// before, and after.
template <bool kMass, int kItems, typename Group>
__device__ ThresholdBucket radix_select(Group& group, const std::uint32_t (&keys)[kItems], ThresholdBucket threshold,
                                        MassHistogram* mass, Shared& shared) {
  const std::uint32_t max_candidates = group.size() > 1 ? kMaxCandidates : kMaxCompared;
  while (threshold.span > 0 && threshold.inside > max_candidates) {
    const int shift = digit_shift(threshold);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      count_digit<kMass>(keys[i], threshold, shift, mass, shared);
    }
    const ThreadBuckets buckets = group.template all_reduce<kMass, !kMass>(mass, shared);
    threshold = find_threshold<kMass>(buckets, threshold, shift, shared);
  }
  if (threshold.span == 0) {
    return threshold;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (keys[i] - threshold.lo <= threshold.span) {
      shared.candidates[atomicAdd(&shared.num_candidates, 1)] = keys[i];
    }
  }
  const int num_candidates = static_cast<int>(threshold.inside);
  group.all_gather_candidates(shared, num_candidates);
  const std::uint32_t* compared = shared.candidates;
  if (threshold.inside > kMaxCompared) {
    while (threshold.span > 0 && threshold.inside > kMaxCompared) {
      const int shift = digit_shift(threshold);
#pragma unroll 1
      for (int i = threadIdx.x; i < num_candidates; i += kThreads) {
        count_digit<kMass>(shared.candidates[i], threshold, shift, mass, shared);
      }
      __syncthreads();
      threshold = find_threshold<kMass>(take_buckets<kMass, !kMass, 1>(mass, shared), threshold, shift, shared);
    }
    if (threshold.span > 0) {
#pragma unroll 1
      for (int i = threadIdx.x; i < num_candidates; i += kThreads) {
        if (shared.candidates[i] - threshold.lo <= threshold.span) {
          shared.compared[atomicAdd(&shared.num_compared, 1)] = shared.candidates[i];
        }
      }
      __syncthreads();
      compared = shared.compared;
    }
  }
  if (threshold.span > 0) {
    threshold = find_threshold_by_comparison<kMass>(compared, threshold, shared);
  }
  if (threadIdx.x == 0) {
    shared.num_candidates = shared.num_compared = 0;
  }
  return threshold;
}

}  // namespace zipvl::cuda::select_tokens
