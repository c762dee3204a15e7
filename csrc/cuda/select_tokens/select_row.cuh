// Token selection of one row by a team of blocks, each with its share of the row in registers.
//
// No sort. Both questions are the same descent over the bits of the scores, most significant first: a histogram of the
// candidates' next 11 bits, a scan from the highest bin down, and the bin where the running sum reaches what is needed
// holds the next candidates. For the budget a bin sums mass, for the rank it counts tokens; the first histograms of
// both are made at once. As soon as candidates are few they are listed, and compared each with each.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/budget.cuh"
#include "cuda/select_tokens/emit.cuh"

namespace zipvl::cuda::select {

// What a row is like, and where a thread's four rank bins stand in it.
struct Survey {
  int top;  // the highest bin of the budget that has a token; -1: none
  int real, kept;
  bool usable;         // every score is finite, and neither the budget's nor the ranks' are all 0
  bool some_negative;  // usable, but a sum may be 0 or less
  int ranks_before;    // tokens in the bins above this thread's
  int positive;        // tokens in all bins but bin 0, which none is counted into
};

// Takes the counters out of the rank bins.
__device__ inline Survey survey(Four& four, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < 2) {  // bins 2,044 to 2,047, and 2,040 to 2,043
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      shared.counters[4 - 4 * threadIdx.x + i] = four.rank[i];
      four.rank[i] = threadIdx.x == 0 && i == kBinsEach - 1 ? four.rank[i] : 0;
    }
  }
  Survey row{};
  row.top = -1;
  std::uint32_t ranks = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    row.top = four.count[i] != 0 ? group_of_thread() * kBinsEach + i : row.top;
    ranks += four.rank[i];
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
  const auto counted = [&shared](int bin) { return static_cast<int>(shared.counters[bin - kNotFiniteBin]); };
  row.real = counted(kRealBin);
  row.kept = counted(kKeptBin);
  row.usable = counted(kNotFiniteBin) == 0 && counted(kBudgetBin) != 0 && counted(kRankBin) != 0;
  row.some_negative = row.usable && counted(kNegativeBin) != 0;
  return row;
}

// The bin in which the ranks from the highest down reach `target` tokens, fewer than are real.
__device__ inline Cut rank_cut(Four& four, const Survey& row, int target, Shared& shared) {
  if (threadIdx.x == kThreads - 1) {
    four.rank[0] = row.real - row.positive;
  }
  int before = row.ranks_before;
  if (before < target &&
      target <= before + static_cast<int>(four.rank[0] + four.rank[1] + four.rank[2] + four.rank[3])) {
#pragma unroll
    for (int i = kBinsEach - 1; i >= 0; --i) {
      const int through = before + static_cast<int>(four.rank[i]);
      if (before < target && target <= through) {
        const auto bin = static_cast<std::uint32_t>(group_of_thread() * kBinsEach + i);
        // Kept tokens have one key; those that are not real have the key below 1.
        const std::uint32_t lo = bin == kKeptBin ? kKept : bin == 0 ? 1U : kRankZero + (bin << kFirstShift);
        const std::uint32_t span = bin == kKeptBin ? 0U : bin == 0 ? kRankZero + kFirstSpan - lo : kFirstSpan;
        shared.cut = {static_cast<std::uint64_t>(target - before), lo, span, static_cast<std::uint32_t>(before),
                      four.rank[i]};
      }
      before = through;
    }
  }
  __syncthreads();
  return shared.cut;
}

// A Team is the blocks that share a row; every thread of every block makes the same calls.
//   rank(), size()
//   merge<kMass, kRank>(mass, shared)  the sums of the blocks' bins, four a thread; the bins are 0 afterwards
//   gather_list(shared, all)           shared.list of every block becomes the lists of all, `all` keys in any order
//   gather(slot, mine, n, use)         use(value) of each block of rank below n, in that order; each slot once a row
// Scores load the bits of the block's scores; kSigned: they may be negative, and are those of params.
template <int kItems, typename Team, typename Scores>
__device__ void select_row(Team& team, const Scores& scores, std::int64_t b, const SelectTokensParams& params,
                           MassBins* bins, Shared& shared) {
  constexpr int kCopies = kItems / 8;
  const int first = team.rank() * (kThreads * kItems);
  const bool by_mass = params.ratio <= 0 && params.tau < 1;
  Keys<kItems> keys;
  const Seen seen = load(keys, scores, params, b, first, [&] {
    constexpr int kEach = kCopies * static_cast<int>(sizeof(MassBins) / sizeof(uint4)) / kThreads;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      reinterpret_cast<uint4*>(bins)[i * kThreads + threadIdx.x] = uint4{0, 0, 0, 0};
    }
    reinterpret_cast<uint4*>(shared.rank)[threadIdx.x] = uint4{0, 0, 0, 0};
    if (threadIdx.x == 0) {
      shared.listed = shared.paired = 0;
    }
    __syncthreads();
  });
  add_first(keys, seen, by_mass, bins, shared);
  Four four = team.template merge<true, true>(bins, shared);

  const Survey row = survey(four, shared);
  bool usable = row.usable;
  Sums sums{};
  if (Scores::kSigned && row.some_negative) {
    sums = signed_sums(team, params, b, keys, first, shared);
    usable = sums.budget != 0 && sums.rank != 0 && (!by_mass || sums.budget > 0);  // no share of a negative sum
  }
  int target = row.real;
  if (usable) {
    if (params.ratio > 0) {
      target = static_cast<int>(ceil(params.ratio * row.real));
    } else if (by_mass) {
      target = budget_by_mass(team, keys, four, row.top, Scores::kSigned && row.some_negative ? &sums : nullptr, params,
                              bins, shared);
    }
    target = min(max(max(target, row.kept), params.min_tokens), row.real);
    target = target > params.dense_above * row.real ? row.real : target;
  }
  Cut cut{0, kNotReal, 0, 0, 0};  // every real token
  if (target < row.real) {
    cut = rank_cut(four, row, target, shared);
    if (cut.span > 0) {
      cut = resolve<false>(team, keys.rank, cut, bins, shared);
    }
  }
  emit(team, b, keys, first, cut.lo, static_cast<int>(cut.need), target, params, shared);
}

}  // namespace zipvl::cuda::select
