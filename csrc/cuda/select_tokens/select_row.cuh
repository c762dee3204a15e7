// Token selection of one row by a team of blocks, each with its share of the row in shared memory.
//
// No sort. Both questions are the same descent over the bits of the scores, most significant first, in three levels of
// 11, 11 and 10 bits: a histogram of the candidates' next bits, a scan from the highest bin down, and the bin where the
// running sum reaches what is needed holds the next candidates. For the budget a bin sums mass, for the rank tokens.
// What is left is one value. Mass is an integer, in units of 2**-62 of a bound of the row's sum, so that the order in
// which threads add cannot matter: sums are exact where every score is a multiple of the unit, which is the largest
// score times at most tokens * 2**-61, and otherwise off by half a unit a score.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/select_tokens.h"
#include "plan/select_tokens.h"

namespace zipvl::cuda::select {

constexpr int kThreads = plan::kSelectThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = plan::kSelectBins;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kRecordBytes = plan::kSelectRecordBytes;
constexpr int kLevels = plan::kSelectLevels / 2;  // of one descent
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// Rank keys: the scores in their order, with two values that no finite score has.
constexpr std::uint32_t kNotReal = 0, kNotFinite = 1, kKept = 0xFFFFFFFFU;

struct Totals {  // of a row, or part of it
  double budget = 0, rank = 0;
  std::uint32_t largest = 0;  // bits of the largest |budget score|
  int real = 0, kept = 0;
  int unused = 0;

  __device__ Totals operator+(const Totals& other) const {
    return {budget + other.budget, rank + other.rank, max(largest, other.largest), real + other.real,
            kept + other.kept};
  }
};

struct Tally {  // tokens above and at a cut
  int above = 0, equal = 0;

  __device__ Tally operator+(const Tally& other) const { return {above + other.above, equal + other.equal}; }
};

static_assert(sizeof(Totals) <= kRecordBytes && sizeof(Tally) <= kRecordBytes);

// A histogram of 64-bit sums in halves: shared memory adds 32 bits at a time.
struct Bins {
  std::uint32_t low[kBins], high[kBins];

  __device__ std::int64_t sum(int bin) const {
    return static_cast<std::int64_t>((static_cast<std::uint64_t>(high[bin]) << 32) | low[bin]);
  }

  __device__ void add(int bin, std::int64_t weight) {
    const auto add_low = static_cast<std::uint32_t>(weight);
    const std::uint32_t before = atomicAdd(&low[bin], add_low);
    const auto add_high = static_cast<std::uint32_t>(weight >> 32) + (before + add_low < before ? 1U : 0U);
    if (add_high != 0) {
      atomicAdd(&high[bin], add_high);
    }
  }
};

struct Shared {
  Bins bins;
  alignas(16) unsigned char records[kWarps][kRecordBytes];
  std::int64_t warp_sums[kWarps];
  std::int64_t cut_above;
  int cut_bin;
};

template <typename T>
__device__ T shuffle_xor(const T& value, int mask) {
  static_assert(sizeof(T) % 4 == 0);
  std::uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (std::uint32_t& word : words) {
    word = __shfl_xor_sync(kAllLanes, word, mask);
  }
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// The sum over a warp, the same bits in every lane.
template <typename T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value = value + shuffle_xor(value, mask);
  }
  return value;
}

// The sum of read(0), ..., read(n - 1), in every lane.
template <typename T, typename Read>
__device__ T sum_of(int n, const Read& read) {
  T mine{};
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < n; i += 32) {
    mine = mine + read(i);
  }
  return warp_sum(mine);
}

// Ascending floats as ascending integers; -0 and 0 are one value.
__device__ inline std::uint32_t ordered(float value) {
  const std::uint32_t bits = __float_as_uint(value + 0.0F);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFU : 0x80000000U);
}

// What a block holds of its row.
struct Part {
  float* budget;        // shared [tokens_per_block]; 0 where the token is not real
  std::uint32_t* rank;  // shared [tokens_per_block]
  int first;            // position of its first token
  int warp_tokens;      // consecutive tokens a warp, a multiple of 32

  // Calls visit(i) with the places i of this lane's tokens in the block, lanes side by side, every lane as often.
  template <typename Visit>
  __device__ void each(const Visit& visit) const {
    const int start = threadIdx.x / 32 * warp_tokens + threadIdx.x % 32;
#pragma unroll 4
    for (int i = 0; i < warp_tokens; i += 32) {
      visit(start + i);
    }
  }
};

__device__ inline Totals load(const SelectTokensParams& params, std::int64_t b, const Part& part) {
  const float* budget_score = params.budget_score + b * params.budget_stride[0];
  const float* rank_score = params.rank_score + b * params.rank_stride[0];
  const bool* token_mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.mask_stride[0];
  const bool* keep_mask = params.keep_mask == nullptr ? nullptr : params.keep_mask + b * params.keep_stride[0];
  Totals totals;
  part.each([&](int i) {
    // Every load is of memory that is there, and waits for no other: a few tokens a lane are in flight at once.
    const bool inside = part.first + i < params.tokens;
    const std::int64_t n = inside ? part.first + i : params.tokens - 1;
    const float budget_given = budget_score[n * params.budget_stride[1]];
    const float rank_given = rank_score[n * params.rank_stride[1]];
    const bool real = (token_mask == nullptr || token_mask[n * params.mask_stride[1]]) && inside;
    const bool kept = (keep_mask != nullptr && keep_mask[n * params.keep_stride[1]]) && real;
    const float budget = real ? budget_given : 0.0F, rank = real ? rank_given : 0.0F;
    totals.budget += budget;
    totals.rank += rank;
    totals.largest = max(totals.largest, __float_as_uint(budget) & 0x7FFFFFFFU);
    totals.real += real ? 1 : 0;
    totals.kept += kept ? 1 : 0;
    part.budget[i] = budget;
    part.rank[i] = !real ? kNotReal : kept ? kKept : isfinite(rank) ? ordered(rank) : kNotFinite;
  });
  return totals;
}

// The sum of every thread's part over the block, in every thread. `T` has a slot of shared.records.
template <typename T>
__device__ T block_sum(const T& mine, Shared& shared) {
  const T warp = warp_sum(mine);
  if (threadIdx.x % 32 == 0) {
    *reinterpret_cast<T*>(shared.records[threadIdx.x / 32]) = warp;
  }
  __syncthreads();
  const T sum = sum_of<T>(kWarps, [&](int w) { return *reinterpret_cast<const T*>(shared.records[w]); });
  __syncthreads();  // records may be written again
  return sum;
}

// Where a descent ended: the key, the sum of the weights of the keys above it, and the sum that was to be reached.
struct Cut {
  std::uint32_t key;
  std::int64_t above, need;
};

// One level: finds the bin in which the sum from the highest bin down, started at `above`, reaches `need`; that is
// need_of(sum of all bins) where `need` is 0. Returns it.
template <typename Team, typename NeedOf>
__device__ std::int64_t find_bin(const Team& team, int level, std::int64_t above, std::int64_t need,
                                 const NeedOf& need_of, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int top = kBins - 1 - kBinsPerThread * static_cast<int>(threadIdx.x);
  std::int64_t sums[kBinsPerThread], mine = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    sums[i] = team.sum(level, top - i);
    mine += sums[i];
  }
  std::int64_t inclusive = mine;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const std::int64_t lower = __shfl_up_sync(kAllLanes, inclusive, delta);
    inclusive += lane >= delta ? lower : 0;
  }
  if (lane == 31) {
    shared.warp_sums[warp] = inclusive;
  }
  __syncthreads();
  const std::int64_t warp_total = shared.warp_sums[lane];
  if (need == 0) {
    need = need_of(warp_sum(warp_total));
  }
  std::int64_t before = above + inclusive - mine + warp_sum(lane < warp ? warp_total : std::int64_t{0});
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (before < need && need <= before + sums[i]) {
      shared.cut_bin = top - i;
      shared.cut_above = before;
    }
    before += sums[i];
  }
  __syncthreads();
  return need;
}

// The largest key such that the weights of the keys at and above it sum to at least need_of(sum of all), which is at
// least 1 and at most that sum. A weight may be 0; `first_level` numbers the team's histograms.
template <typename Team, typename Key, typename Weight, typename NeedOf>
__device__ Cut descend(Team& team, int first_level, const Part& part, Shared& shared, const Key& key_of,
                       const Weight& weight_of, const NeedOf& need_of) {
  Cut cut{0, 0, 0};
  std::uint32_t known = 0;  // the bits of cut.key decided so far
#pragma unroll 1
  for (int level = 0; level < kLevels; ++level) {
    const int shift = max(21 - 11 * level, 0), mask = level == kLevels - 1 ? 1023 : 2047;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      shared.bins.low[i * kThreads + threadIdx.x] = 0;
      shared.bins.high[i * kThreads + threadIdx.x] = 0;
    }
    __syncthreads();
    part.each([&](int i) {
      const std::uint32_t key = key_of(i);
      const bool candidate = (key & known) == cut.key;
      const std::int64_t weight = candidate ? weight_of(i) : 0;
      const unsigned adding = __ballot_sync(kAllLanes, weight != 0);
      if (adding == 0) {
        return;
      }
      // Ties are common and would all meet in one address: a warp of one bin adds once.
      const int bin = static_cast<int>(key >> shift) & mask;
      const int leader = __ffs(static_cast<int>(adding)) - 1;
      const int leading_bin = __shfl_sync(kAllLanes, bin, leader);
      if (__all_sync(kAllLanes, weight == 0 || bin == leading_bin)) {
        const std::int64_t sum = warp_sum(weight);
        if (static_cast<int>(threadIdx.x % 32) == leader) {
          shared.bins.add(bin, sum);
        }
      } else if (weight != 0) {
        shared.bins.add(bin, weight);
      }
    });
    team.merge(first_level + level, shared.bins);
    cut.need = find_bin(team, first_level + level, cut.above, cut.need, need_of, shared);
    cut.key |= static_cast<std::uint32_t>(shared.cut_bin) << shift;
    cut.above = shared.cut_above;
    known |= static_cast<std::uint32_t>(mask) << shift;
  }
  return cut;
}

// Fixed point for the row's budget scores: |score| * scale < 2**62 / tokens.
__device__ inline double fixed_point_scale(std::uint32_t largest, int tokens) {
  const int bound = static_cast<int>(largest >> 23) - 126;  // largest < 2**bound
  const int shift = 62 - bound - (32 - __clz(tokens - 1));
  return __hiloint2double((shift + 1023) << 20, 0);
}

// p: the fewest real tokens whose largest budget scores sum to tau of the total.
template <typename Team>
__device__ int budget_by_mass(Team& team, const Part& part, const Totals& totals, const SelectTokensParams& params,
                              Shared& shared) {
  const double scale = fixed_point_scale(totals.largest, params.tokens);
  const auto mass = [&](int i) { return __double2ll_rn(part.budget[i] * scale); };
  const auto need_of = [&](std::int64_t total) {
    const std::int64_t share = __double2ll_ru(__ll2double_rn(total) * params.tau);
    return max(std::int64_t{1}, min(total, share));
  };
  const Cut cut = descend(team, 0, part, shared, [&](int i) { return ordered(part.budget[i]); }, mass, need_of);
  int above = 0;
  part.each([&](int i) { above += ordered(part.budget[i]) > cut.key ? 1 : 0; });
  const Tally tally = team.template sum_records<Tally>(1, block_sum(Tally{above, 0}, shared), team.size());
  const std::uint32_t bits = cut.key ^ ((cut.key >> 31) != 0 ? 0x80000000U : 0xFFFFFFFFU);
  const std::int64_t value = __double2ll_rn(__uint_as_float(bits) * scale);
  return tally.above + static_cast<int>((cut.need - cut.above + value - 1) / value);
}

// Writes the row of index: tokens above the cut, and the first `ties` at it.
template <typename Team>
__device__ void emit(Team& team, std::int64_t b, const Part& part, std::uint32_t cut, int ties, int count,
                     const SelectTokensParams& params, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned lower_lanes = (1U << lane) - 1U;
  Tally mine;
  part.each([&](int i) {
    mine.above += part.rank[i] > cut ? 1 : 0;
    mine.equal += part.rank[i] == cut ? 1 : 0;
  });
  const Tally of_warp = warp_sum(mine);
  if (lane == 0) {
    *reinterpret_cast<Tally*>(shared.records[warp]) = of_warp;
  }
  __syncthreads();
  const auto record = [&](int w) { return *reinterpret_cast<const Tally*>(shared.records[w]); };
  const Tally block = sum_of<Tally>(kWarps, record);
  Tally before = team.template sum_records<Tally>(2, block, team.rank()) + sum_of<Tally>(warp, record);
  std::int32_t* index = params.index + b * params.tokens;
  part.each([&](int i) {
    const std::uint32_t key = part.rank[i];
    const unsigned above = __ballot_sync(kAllLanes, key > cut), equal = __ballot_sync(kAllLanes, key == cut);
    const int equal_before = before.equal + __popc(equal & lower_lanes);
    if (key > cut || (key == cut && equal_before < ties)) {
      index[before.above + __popc(above & lower_lanes) + min(equal_before, ties)] = part.first + i;
    }
    if (part.first + i >= count && part.first + i < params.tokens) {
      index[part.first + i] = params.tokens;
    }
    before = before + Tally{__popc(above), __popc(equal)};
  });
  if (team.rank() == 0 && threadIdx.x == 0) {
    params.count[b] = count;
  }
}

// A Team is the blocks that share a row:
//   rank(), size()
//   merge(level, bins)    adds the blocks' bins up; afterwards sum(level, bin) is the sum, in every block
//   sum_records<T>(slot, mine, n)   the sum of `mine` over the blocks of rank below n; each slot is used once a row
template <typename Team>
__device__ void select_row(Team& team, std::int64_t b, const SelectTokensParams& params, Shared& shared,
                           void* tokens /* shared [2 * tokens_per_block], 4 bytes each */) {
  const Part part{static_cast<float*>(tokens), static_cast<std::uint32_t*>(tokens) + params.tokens_per_block,
                  team.rank() * params.tokens_per_block, params.tokens_per_block / kWarps};
  const Totals totals = team.template sum_records<Totals>(0, block_sum(load(params, b, part), shared), team.size());
  // Finite float32 scores cannot overflow a float64 sum, and one that is not finite shows in it.
  const bool usable = isfinite(totals.budget) && isfinite(totals.rank) && totals.budget != 0.0 && totals.rank != 0.0;
  int target = totals.real;
  if (usable) {
    if (params.ratio > 0) {
      target = static_cast<int>(ceil(params.ratio * totals.real));
    } else if (params.tau < 1 && totals.budget > 0) {  // a negative sum has no tau of itself to reach
      target = budget_by_mass(team, part, totals, params, shared);
    }
    target = min(max(max(target, totals.kept), params.min_tokens), totals.real);
  }
  Cut cut{kNotReal, target, target};  // every real token
  if (target < totals.real) {
    cut = descend(
        team, kLevels, part, shared, [&](int i) { return part.rank[i]; },
        [&](int i) { return std::int64_t{part.rank[i] != kNotReal}; },
        [&](std::int64_t) { return std::int64_t{target}; });
  }
  emit(team, b, part, cut.key, target - static_cast<int>(cut.above), target, params, shared);
}

}  // namespace zipvl::cuda::select
