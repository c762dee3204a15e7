// The descent: the value at which the weights of a row's keys, from the highest key down, reach a sum.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/select_tokens/select_tokens.h"
#include "plan/select_tokens.h"

namespace zipvl::cuda::select {

constexpr int kThreads = plan::kSelectThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = plan::kSelectBins;
constexpr int kLevels = plan::kSelectLevels / 2;  // of one descent
constexpr int kRecordBytes = plan::kSelectRecordBytes;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kBatch = 4;  // tokens a lane works on at once, so that one does not wait for another

// The sign and the exponent, then the bits of the fraction: 9, 8, 8 and 7 bits.
__device__ constexpr int shift_of(int level) { return level == kLevels - 1 ? 0 : 23 - 8 * level; }
__device__ constexpr int mask_of(int level) { return level == 0 ? 511 : level == kLevels - 1 ? 127 : 255; }
static_assert(kLevels == 4 && kBins == 512);

// Threads that hold a pair of bins each where a level is searched.
constexpr int kPairs = kBins / 2;
static_assert(kPairs <= kThreads);

// A histogram of 64-bit sums in halves, because shared memory adds 32 bits at a time, and in copies, which neighbouring
// lanes use in turn: scores are alike, and lanes that meet in one address wait for each other.
struct Bins {
  static constexpr int kCopies = 4;
  uint4 low[kBins], high[kBins];

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      low[bin] = high[bin] = uint4{0, 0, 0, 0};
    }
  }

  __device__ void add(int bin, std::int64_t weight) {
    const int word = bin * kCopies + static_cast<int>(threadIdx.x % kCopies);
    const auto add_low = static_cast<std::uint32_t>(weight);
    const std::uint32_t before = atomicAdd(reinterpret_cast<std::uint32_t*>(low) + word, add_low);
    const auto add_high = static_cast<std::uint32_t>(weight >> 32) + (before + add_low < before ? 1U : 0U);
    if (add_high != 0) {
      atomicAdd(reinterpret_cast<std::uint32_t*>(high) + word, add_high);
    }
  }

  // The sum of a bin, which is 0 from then on.
  __device__ std::int64_t take(int bin) {
    const uint4 l = low[bin], h = high[bin];
    low[bin] = high[bin] = uint4{0, 0, 0, 0};
    const std::uint64_t lows = std::uint64_t{l.x} + l.y + l.z + l.w;
    return static_cast<std::int64_t>(lows + (static_cast<std::uint64_t>(h.x + h.y + h.z + h.w) << 32));
  }
};

struct BinPair {
  std::int64_t lower, upper;  // bins 2 * pair and 2 * pair + 1
};

// The first kPairs threads hold one each, thread 0 the highest.
__device__ inline bool has_pair() { return threadIdx.x < kPairs; }
__device__ inline int pair_of_thread() { return kPairs - 1 - static_cast<int>(threadIdx.x); }

struct Shared {
  Bins bins;
  alignas(16) unsigned char records[kWarps][kRecordBytes];
  std::int64_t warp_sums[kPairs / 32];
  std::int64_t cut_above;
  int cut_bin;
};

// use(value) of each of the first n warps' `mine`, in order, in every thread.
template <typename T, typename Use>
__device__ void gather_warps(const T& mine, int n, Shared& shared, const Use& use) {
  static_assert(sizeof(T) == kRecordBytes);
  if (threadIdx.x % 32 == 0) {
    memcpy(shared.records[threadIdx.x / 32], &mine, sizeof(T));
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < n; ++w) {
    T record;
    memcpy(&record, shared.records[w], sizeof(T));
    use(record);
  }
  __syncthreads();  // records may be written again
}

// The bits of ascending floats as ascending integers, for -0 made 0.
__device__ inline std::uint32_t ordered(std::uint32_t bits) {
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFU : 0x80000000U);
}

// What a block holds of its row.
struct Part {
  float* budget;        // shared [tokens_per_block]; 0 where the token is not real
  std::uint32_t* rank;  // shared [tokens_per_block]
  int first;            // position of its first token
  int warp_tokens;      // consecutive tokens a warp, a multiple of 128

  // The place in the block of this lane's first token; the next ones follow 32 apart.
  __device__ int start() const { return static_cast<int>(threadIdx.x) / 32 * warp_tokens + threadIdx.x % 32; }

  // Calls visit(i) with the first of kBatch places, 32 apart, of this lane's tokens in order, every lane as often.
  template <typename Visit>
  __device__ void each_batch(const Visit& visit) const {
    const int begin = start(), end = begin + warp_tokens;
    for (int i = begin; i < end; i += 32 * kBatch) {
      visit(i);
    }
  }

  template <typename Visit>
  __device__ void each(const Visit& visit) const {
    each_batch([&visit](int first_place) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        visit(first_place + 32 * j);
      }
    });
  }
};

// Where a descent ended: the key, the sum of the weights of the keys above it, and the sum that was to be reached.
struct Cut {
  std::uint32_t key;
  std::int64_t above, need;
};

// One level: finds the bin in which the sum from the highest bin down, started at `above`, reaches `need`; that is
// need_of(sum of all bins) where `need` is 0. Returns it.
template <typename NeedOf>
__device__ std::int64_t find_bin(const BinPair& pair, std::int64_t above, std::int64_t need, const NeedOf& need_of,
                                 Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t mine = pair.lower + pair.upper;
  std::int64_t inclusive = mine;
  if (has_pair()) {  // whole warps
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const std::int64_t lower = __shfl_up_sync(kAllLanes, inclusive, delta);
      inclusive += lane >= delta ? lower : 0;
    }
    if (lane == 31) {
      shared.warp_sums[warp] = inclusive;
    }
  }
  __syncthreads();
  std::int64_t before = above + inclusive - mine, total = 0;
#pragma unroll
  for (int w = 0; w < kPairs / 32; ++w) {
    before += w < warp ? shared.warp_sums[w] : 0;
    total += shared.warp_sums[w];
  }
  if (need == 0) {
    need = need_of(total);
  }
  const std::int64_t between = before + pair.upper;
  if (has_pair() && before < need && need <= between) {
    shared.cut_bin = 2 * pair_of_thread() + 1;
    shared.cut_above = before;
  }
  if (has_pair() && between < need && need <= between + pair.lower) {
    shared.cut_bin = 2 * pair_of_thread();
    shared.cut_above = between;
  }
  __syncthreads();
  return need;
}

// The largest key such that the weights of the keys at and above it sum to at least need_of(sum of all), which is at
// least 1 and at most that sum. A weight may be 0; `first_level` numbers the team's histograms.
// The bins are empty before, and after.
template <typename Team, typename Key, typename Weight, typename NeedOf>
__device__ Cut descend(Team& team, int first_level, const Part& part, Shared& shared, const Key& key_of,
                       const Weight& weight_of, const NeedOf& need_of) {
  Cut cut{0, 0, 0};
  std::uint32_t known = 0;  // the bits of cut.key decided so far
#pragma unroll 1
  for (int level = 0; level < kLevels; ++level) {
    const int shift = shift_of(level), mask = mask_of(level);
    part.each_batch([&](int i) {
      std::uint32_t key[kBatch];
      std::int64_t weight[kBatch];
      int lowest = kBins, highest = -1;  // bins that get something
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        key[j] = key_of(i + 32 * j);
        weight[j] = (key[j] & known) == cut.key ? weight_of(i + 32 * j) : 0;
        key[j] = (key[j] >> shift) & mask;
        lowest = weight[j] != 0 ? min(lowest, static_cast<int>(key[j])) : lowest;
        highest = weight[j] != 0 ? max(highest, static_cast<int>(key[j])) : highest;
      }
      lowest = __reduce_min_sync(kAllLanes, lowest);
      highest = __reduce_max_sync(kAllLanes, highest);
      if (lowest < highest) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (weight[j] != 0) {
            shared.bins.add(static_cast<int>(key[j]), weight[j]);
          }
        }
      } else if (lowest == highest) {  // ties are common and would all meet in one address
        std::int64_t sum = 0;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          sum += weight[j];
        }
#pragma unroll
        for (int other = 16; other > 0; other /= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, other);
        }
        if (threadIdx.x % 32 == 0) {
          shared.bins.add(lowest, sum);
        }
      }
    });
    const BinPair pair = team.merge(first_level + level, shared.bins);
    cut.need = find_bin(pair, cut.above, cut.need, need_of, shared);
    cut.key |= static_cast<std::uint32_t>(shared.cut_bin) << shift;
    cut.above = shared.cut_above;
    known |= static_cast<std::uint32_t>(mask) << shift;
  }
  return cut;
}

}  // namespace zipvl::cuda::select
