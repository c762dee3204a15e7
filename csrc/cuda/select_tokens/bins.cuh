// Histograms of a block's keys in shared memory, and what a block shares beside them.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/plan.h"
#include "cuda/select_tokens/select_tokens.h"

namespace zipvl::cuda::select {

constexpr int kThreads = plan::kSelectThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = plan::kSelectBins;
constexpr int kBinBits = 11;
constexpr int kBinsEach = kBins / kThreads;  // of a thread where bins are searched
constexpr int kMaxListed = plan::kSelectMaxListed;
constexpr int kMaxPaired = kThreads / 4;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
static_assert(kBins == 1 << kBinBits && kBinsEach == 4);

// The first level: bins of 2**20 keys. Budget keys are the bits of floats that are not negative, so eight bins share an
// exponent and a bin's mass is its count times the fraction's known bits, plus the sum of the 20 bits below: integers.
constexpr int kFirstShift = 20;
constexpr std::uint32_t kFirstSpan = (1U << kFirstShift) - 1U;
// Rank keys, the floats' order as integers; below the first bin of positive ones lie tiny and negative ones, in bin 0.
constexpr std::uint32_t kRankZero = 0x80000000U;
// No finite float falls into bins 2,040 to 2,046 of the ranks: they count what is known of a row's scores.
constexpr int kNotFiniteBin = 2040, kBudgetBin = 2041, kRankBin = 2042, kNegativeBin = 2043, kRealBin = 2044;
constexpr int kKeptBin = 2047;  // of kKept

struct Scan {  // of a warp, for the others
  std::uint64_t mass[kWarps];
  std::uint32_t count[kWarps];
};

// The keys in which a sum from the highest key down reaches what is needed.
struct Cut {
  std::uint64_t need;      // the weight still to be reached, from the highest key of the range down
  std::uint32_t lo, span;  // lo to lo + span
  std::uint32_t above;     // keys above the range
  std::uint32_t inside;    // keys in it
};

// A thread's four neighbouring bins, lowest first; thread 0 has the highest.
struct Four {
  std::uint32_t count[kBinsEach];
  std::uint64_t low[kBinsEach];  // sum of the bits below the bin's
  std::uint32_t rank[kBinsEach];
};

struct Shared {
  std::uint32_t rank[kBins];
  std::uint32_t list[kMaxListed];
  std::uint32_t pairs[kMaxPaired];
  Scan scan;
  std::uint32_t rank_sums[kWarps], tallies[kWarps];
  std::int32_t top[kWarps];
  std::uint32_t counters[8];  // bins 2,040 to 2,047
  Cut cut;
  int listed, paired;
  uint4 records[kWarps];
};

// The budget's bins come in copies: sums of 20 bits of 4,096 tokens are what 32 bits hold.
struct MassBins {
  std::uint32_t count[kBins], low[kBins];
};

__device__ inline int group_of_thread() { return kThreads - 1 - static_cast<int>(threadIdx.x); }

// A thread's bins, which are 0 from then on. All adds are done.
template <bool kMass, bool kRank, int kCopies>
__device__ Four take_bins(MassBins* mass, Shared& shared) {
  Four four{};
  const int group = group_of_thread();
  if constexpr (kMass) {
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      auto* counts = reinterpret_cast<uint4*>(mass[copy].count) + group;
      auto* lows = reinterpret_cast<uint4*>(mass[copy].low) + group;
      const uint4 c = *counts, l = *lows;
      *counts = *lows = uint4{0, 0, 0, 0};
      four.count[0] += c.x, four.count[1] += c.y, four.count[2] += c.z, four.count[3] += c.w;
      four.low[0] += l.x, four.low[1] += l.y, four.low[2] += l.z, four.low[3] += l.w;
    }
  }
  if constexpr (kRank) {
    auto* ranks = reinterpret_cast<uint4*>(shared.rank) + group;
    const uint4 r = *ranks;
    *ranks = uint4{0, 0, 0, 0};
    four.rank[0] = r.x, four.rank[1] = r.y, four.rank[2] = r.z, four.rank[3] = r.w;
  }
  return four;
}

}  // namespace zipvl::cuda::select
