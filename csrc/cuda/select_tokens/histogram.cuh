// Histograms of the top digits of a block's keys in shared memory, and what a block shares beside them.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/select_tokens/params.h"
#include "cuda/select_tokens/plan.h"

namespace zipvl::cuda::select_tokens {

constexpr int kThreads = plan::kSelectThreads;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kBuckets = plan::kSelectBuckets;
constexpr int kDigitBits = 11;
constexpr int kBucketsPerThread = kBuckets / kThreads;  // four neighbours, where a thread looks for the threshold
constexpr int kMaxCandidates = plan::kSelectMaxCandidates;
constexpr int kMaxCompared = kThreads / 4;
static_assert(kBuckets == 1 << kDigitBits && kBucketsPerThread == 4);

// The top digit: buckets of 2**20 keys. Budget keys are the bits of floats that are not negative, so eight buckets
// share an exponent and a bucket's mass is its count times the fraction's known bits, plus the sum of the 20 bits
// below: integers.
constexpr int kTopDigitShift = 20;
constexpr std::uint32_t kTopBucketSpan = (1U << kTopDigitShift) - 1U;
// Rank keys, the floats' order as integers; below the first bucket of positive ones lie tiny and negative ones, in
// bucket 0.
constexpr std::uint32_t kRankZero = 0x80000000U;
// No finite float falls into buckets 2,040 to 2,046 of the ranks: they count what is known of a row's scores.
constexpr int kNotFiniteBucket = 2040, kBudgetBucket = 2041, kRankBucket = 2042, kNegativeBucket = 2043,
              kRealBucket = 2044;
constexpr int kKeptBucket = 2047;  // of kKept

struct BlockScan {  // each warp's sums, for the others
  std::uint64_t mass[kWarps];
  std::uint32_t count[kWarps];
};

// The bucket of keys in which a sum from the highest key down reaches what is needed.
struct ThresholdBucket {
  std::uint64_t need;      // the weight still to be reached, from the highest key of the range down
  std::uint32_t lo, span;  // lo to lo + span
  std::uint32_t above;     // keys above the range
  std::uint32_t inside;    // keys in it
};

// A thread's four neighbouring buckets, lowest first; thread 0 has the highest.
struct ThreadBuckets {
  std::uint32_t count[kBucketsPerThread];
  std::uint64_t low[kBucketsPerThread];  // sum of the bits below the bucket's
  std::uint32_t rank[kBucketsPerThread];
};

struct Shared {
  std::uint32_t rank[kBuckets];
  std::uint32_t candidates[kMaxCandidates];
  std::uint32_t compared[kMaxCompared];
  BlockScan scan;
  std::uint32_t rank_sums[kWarps], tie_counts[kWarps];
  std::int32_t top[kWarps];
  std::uint32_t counters[8];  // buckets 2,040 to 2,047
  ThresholdBucket threshold;
  int num_candidates, num_compared;
  uint4 records[kWarps];
};

// The budget's buckets come in copies: sums of 20 bits of 4,096 tokens are what 32 bits hold.
struct MassHistogram {
  std::uint32_t count[kBuckets], low[kBuckets];
};

// Between blocks, a bucket of the budget is 64 bits: its count, 21 bits, above the sum of its keys' low bits.
constexpr int kLowBits = 40;

// A thread's quad of neighbouring buckets.
__device__ inline int bucket_quad() { return kThreads - 1 - static_cast<int>(threadIdx.x); }

// A thread's buckets, which are 0 from then on. All adds are done.
template <bool kMass, bool kRank, int kCopies>
__device__ ThreadBuckets take_buckets(MassHistogram* mass, Shared& shared) {
  ThreadBuckets buckets{};
  const int quad = bucket_quad();
  if constexpr (kMass) {
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      auto* counts = reinterpret_cast<uint4*>(mass[copy].count) + quad;
      auto* lows = reinterpret_cast<uint4*>(mass[copy].low) + quad;
      const uint4 c = *counts, l = *lows;
      *counts = *lows = uint4{0, 0, 0, 0};
      buckets.count[0] += c.x, buckets.count[1] += c.y, buckets.count[2] += c.z, buckets.count[3] += c.w;
      buckets.low[0] += l.x, buckets.low[1] += l.y, buckets.low[2] += l.z, buckets.low[3] += l.w;
    }
  }
  if constexpr (kRank) {
    auto* ranks = reinterpret_cast<uint4*>(shared.rank) + quad;
    const uint4 r = *ranks;
    *ranks = uint4{0, 0, 0, 0};
    buckets.rank[0] = r.x, buckets.rank[1] = r.y, buckets.rank[2] = r.z, buckets.rank[3] = r.w;
  }
  return buckets;
}

}  // namespace zipvl::cuda::select_tokens
