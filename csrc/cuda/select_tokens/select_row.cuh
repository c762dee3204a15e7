// Token selection of one row by a group of blocks, each with its share of the row in registers.
//
// No sort. Both questions are one radix select over the bits of the scores: a histogram of the candidates' next digit
// of 11 bits, a scan from the highest bucket down, and the bucket where the running sum reaches what is needed holds
// the next candidates. For the budget a bucket sums mass, for the rank it counts tokens; the top digits of both are
// counted at once. As soon as candidates are few they are listed, and compared each with each.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/budget.cuh"

namespace zipvl::cuda::select_tokens {

// The facts about a row, and where a thread's four rank buckets stand in it.
struct RowSummary {
  int top;  // the highest bucket of the budget that has a token; -1: none
  int real, kept;
  bool usable;         // every score is finite, and neither the budget's nor the ranks' are all 0
  bool some_negative;  // usable, but a sum may be 0 or less
  int ranks_before;    // tokens in the buckets above this thread's
  int positive;        // tokens in all buckets but bucket 0, which none is counted into
};

// Takes the counters out of the rank buckets.
__device__ inline RowSummary summarize_row(ThreadBuckets& buckets, Shared& shared) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  if (threadIdx.x < 2) {  // buckets 2,044 to 2,047, and 2,040 to 2,043
#pragma unroll
    for (int i = 0; i < kBucketsPerThread; ++i) {
      shared.counters[4 - 4 * threadIdx.x + i] = buckets.rank[i];
      buckets.rank[i] = threadIdx.x == 0 && i == kBucketsPerThread - 1 ? buckets.rank[i] : 0;
    }
  }
  RowSummary row{};
  row.top = -1;
  std::uint32_t ranks = 0;
#pragma unroll
  for (int i = 0; i < kBucketsPerThread; ++i) {
    row.top = buckets.count[i] != 0 ? bucket_quad() * kBucketsPerThread + i : row.top;
    ranks += buckets.rank[i];
  }
  std::uint32_t through = ranks;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const std::uint32_t lower = __shfl_up_sync(kAllLanes, through, delta);
    through += lane >= delta ? lower : 0;
  }
  row.top = __reduce_max_sync(kAllLanes, row.top);
  if (lane == 31) {
    shared.rank_sums[warp] = through;
    shared.top[warp] = row.top;
  }
  __syncthreads();
  row.top = __reduce_max_sync(kAllLanes, shared.top[lane % kWarps]);
  const std::uint32_t of_warp = lane < kWarps ? shared.rank_sums[lane] : 0;
  row.positive = static_cast<int>(__reduce_add_sync(kAllLanes, of_warp));
  row.ranks_before = static_cast<int>(through - ranks + __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0));
  const auto counted = [&shared](int bucket) { return static_cast<int>(shared.counters[bucket - kNotFiniteBucket]); };
  row.real = counted(kRealBucket);
  row.kept = counted(kKeptBucket);
  row.usable = counted(kNotFiniteBucket) == 0 && counted(kBudgetBucket) != 0 && counted(kRankBucket) != 0;
  row.some_negative = row.usable && counted(kNegativeBucket) != 0;
  return row;
}

// The bucket in which the ranks from the highest down reach `target` tokens, fewer than are real.
__device__ inline ThresholdBucket rank_threshold(ThreadBuckets& buckets, const RowSummary& row, int target,
                                                 Shared& shared) {
  if (threadIdx.x == kThreads - 1) {
    buckets.rank[0] = row.real - row.positive;
  }
  int before = row.ranks_before;
  if (before < target &&
      target <= before + static_cast<int>(buckets.rank[0] + buckets.rank[1] + buckets.rank[2] + buckets.rank[3])) {
#pragma unroll
    for (int i = kBucketsPerThread - 1; i >= 0; --i) {
      const int through = before + static_cast<int>(buckets.rank[i]);
      if (before < target && target <= through) {
        const auto bucket = static_cast<std::uint32_t>(bucket_quad() * kBucketsPerThread + i);
        // Kept tokens have one key; those that are not real have the key below 1.
        const std::uint32_t lo = bucket == kKeptBucket ? kKept
                                 : bucket == 0         ? 1U
                                                       : kRankZero + (bucket << kTopDigitShift);
        const std::uint32_t span = bucket == kKeptBucket ? 0U
                                   : bucket == 0         ? kRankZero + kTopBucketSpan - lo
                                                         : kTopBucketSpan;
        shared.threshold = {static_cast<std::uint64_t>(target - before), lo, span, static_cast<std::uint32_t>(before),
                            buckets.rank[i]};
      }
      before = through;
    }
  }
  __syncthreads();
  return shared.threshold;
}

struct TieCounts {  // tokens above and at a threshold
  int above, equal;
  int unused[2];
};

// Writes the row of index: tokens above the threshold, and the first `ties` at it.
template <int kItems, typename Group>
__device__ void write_index(Group& group, std::int64_t b, const Keys<kItems>& keys, int first, std::uint32_t threshold,
                            int ties, int count, const SelectTokensParams& params, Shared& shared) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  // Two quads at once: tokens above and at the threshold of the first in the low bytes, of the second in the high ones.
  // A warp's sums are at most 128.
  constexpr int kPairs = kItems / 8;
  std::uint32_t before[kPairs], sums[kPairs], mine = 0;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    std::uint32_t counts = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t key = keys.rank[8 * pair + i];
      counts += key > threshold ? 1U << (i / 4 * 16) : key == threshold ? 256U << (i / 4 * 16) : 0U;
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
    shared.tie_counts[warp] = mine;
  }
  __syncthreads();
  const std::uint32_t of_warp = lane < kWarps ? shared.tie_counts[lane] : 0;
  const std::uint32_t warps_before = __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
  TieCounts sum{};
  if (group.size() > 1) {
    const std::uint32_t of_block = __reduce_add_sync(kAllLanes, of_warp);
    group.all_gather(1, TieCounts{static_cast<int>(of_block & 0xFFFFU), static_cast<int>(of_block >> 16), {}},
                     group.rank(), [&sum](const TieCounts& other) {
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
      if (key > threshold || (key == threshold && equal < ties)) {
        index[above + min(equal, ties)] = n + c;
      }
      above += key > threshold ? 1 : 0;
      equal += key == threshold ? 1 : 0;
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
  if (group.rank() == 0 && threadIdx.x == 0) {
    params.count[b] = count;
  }
}

// A Group is the blocks that share a row; every thread of every block makes the same calls.
//   rank(), size()
//   all_reduce<kMass, kRank>(mass, shared)  the sums of the blocks' buckets, four a thread; they are 0 afterwards
//   all_gather_candidates(shared, all)      shared.candidates becomes those of every block, `all` in any order
//   all_gather(slot, mine, n, use)          use(value) of each block of rank below n, in order; each slot once a row
// A block that has a row to itself:
template <int kCopies>
struct BlockGroup {
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }

  template <bool kMass, bool kRank>
  __device__ ThreadBuckets all_reduce(MassHistogram* mass, Shared& shared) const {
    __syncthreads();
    return take_buckets<kMass, kRank, kCopies>(mass, shared);
  }

  __device__ void all_gather_candidates(Shared& /*shared*/, int /*all*/) const { __syncthreads(); }

  template <typename T, typename Use>
  __device__ void all_gather(int /*slot*/, const T& mine, int n, const Use& use) const {
    if (n > 0) {
      use(mine);
    }
  }
};

// Scores load the bits of the block's scores; kSigned: they may be negative, and are those of params.
template <int kItems, typename Group, typename Scores>
__device__ void select_row(Group& group, const Scores& scores, std::int64_t b, const SelectTokensParams& params,
                           MassHistogram* mass_histogram, Shared& shared) {
  constexpr int kCopies = kItems / 8;
  const int first = group.rank() * (kThreads * kItems);
  const bool by_mass = params.ratio <= 0 && params.tau < 1;
  Keys<kItems> keys;
  const LaneSummary lane_summary = load(keys, scores, params, b, first, [&] {
    constexpr int kEach = kCopies * static_cast<int>(sizeof(MassHistogram) / sizeof(uint4)) / kThreads;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      reinterpret_cast<uint4*>(mass_histogram)[i * kThreads + threadIdx.x] = uint4{0, 0, 0, 0};
    }
    reinterpret_cast<uint4*>(shared.rank)[threadIdx.x] = uint4{0, 0, 0, 0};
    if (threadIdx.x == 0) {
      shared.num_candidates = shared.num_compared = 0;
    }
    __syncthreads();
  });
  count_top_digit(keys, lane_summary, by_mass, mass_histogram, shared);
  ThreadBuckets buckets = group.template all_reduce<true, true>(mass_histogram, shared);

  const RowSummary row = summarize_row(buckets, shared);
  bool usable = row.usable;
  Sums sums{};
  if (Scores::kSigned && row.some_negative) {
    sums = signed_sums(group, params, b, keys, first, shared);
    usable = sums.budget != 0 && sums.rank != 0 && (!by_mass || sums.budget > 0);  // no share of a negative sum
  }
  int target = row.real;
  if (usable) {
    if (params.ratio > 0) {
      target = static_cast<int>(ceil(params.ratio * row.real));
    } else if (by_mass) {
      target = budget_by_mass(group, keys, buckets, row.top, Scores::kSigned && row.some_negative ? &sums : nullptr,
                              params, mass_histogram, shared);
    }
    target = min(target, static_cast<int>(ceil(params.max_ratio * row.real)));
    target = min(max(max(target, row.kept), params.min_tokens), row.real);
  }
  ThresholdBucket threshold{0, kNotReal, 0, 0, 0};  // every real token
  if (target < row.real) {
    threshold = rank_threshold(buckets, row, target, shared);
    if (threshold.span > 0) {
      threshold = radix_select<false>(group, keys.rank, threshold, mass_histogram, shared);
    }
  }
  write_index(group, b, keys, first, threshold.lo, static_cast<int>(threshold.need), target, params, shared);
}

}  // namespace zipvl::cuda::select_tokens
