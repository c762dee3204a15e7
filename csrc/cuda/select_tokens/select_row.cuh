// Token selection of one row by a team of blocks, each with its share of the row in shared memory.
//
// No sort. Both questions are the same descent over the bits of the scores, most significant first, in four levels: a
// histogram of the candidates' next bits, a scan from the highest bin down, and the bin where the running sum reaches
// what is needed holds the next candidates. For the budget a bin sums mass, for the rank it counts tokens. What is left
// is one value. Mass is an integer, in units of 2**-62 of a bound of the row's sum, so that the order in which threads
// add cannot matter: sums are exact where every score is a multiple of the unit, which is the largest score times at
// most tokens * 2**-61, and otherwise off by half a unit a score.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/descent.cuh"

namespace zipvl::cuda::select {

// Rank keys: the scores in their order, with two values that no finite score has.
constexpr std::uint32_t kNotReal = 0, kNotFinite = 1, kKept = 0xFFFFFFFFU;
constexpr std::uint32_t kInfinityBits = 0x7F800000U;  // finite absolute values are below

struct Totals {                                // of a row, or part of it
  std::uint32_t largest_budget, largest_rank;  // bits of the largest absolute value
  std::uint32_t real;                          // tokens, and kNegative where a score is negative
  int kept;
};
constexpr std::uint32_t kNegative = 0x80000000U;

struct Sums {
  double budget, rank;
};

struct Tally {  // tokens above and at a cut
  int above, equal;
  int unused[2];
};

__device__ inline Totals load(const SelectTokensParams& params, std::int64_t b, const Part& part) {
  const float* budget_score = params.budget_score + b * params.budget_stride[0];
  const float* rank_score = params.rank_score + b * params.rank_stride[0];
  const bool* token_mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.mask_stride[0];
  const bool* keep_mask = params.keep_mask == nullptr ? nullptr : params.keep_mask + b * params.keep_stride[0];
  const int keep_from = params.keep_from == nullptr ? params.tokens : params.keep_from[b];
  Totals totals{};
  std::uint32_t signs = 0;
  part.each_batch([&](int i) {
    float budget[kBatch], rank[kBatch];
    bool real[kBatch], kept[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int n = min(part.first + i + 32 * j, params.tokens - 1);  // memory that is there: no load waits for another
      budget[j] = budget_score[n * params.budget_stride[1]];
      rank[j] = rank_score[n * params.rank_stride[1]];
      real[j] = token_mask == nullptr || token_mask[n * params.mask_stride[1]];
      kept[j] = n >= keep_from || (keep_mask != nullptr && keep_mask[n * params.keep_stride[1]]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int place = i + 32 * j;
      real[j] = real[j] && part.first + place < params.tokens;
      kept[j] = kept[j] && real[j];
      const std::uint32_t budget_bits = real[j] ? __float_as_uint(budget[j] + 0.0F) : 0;  // -0 is 0
      const std::uint32_t rank_bits = real[j] ? __float_as_uint(rank[j] + 0.0F) : 0;
      const std::uint32_t budget_size = budget_bits & ~kNegative, rank_size = rank_bits & ~kNegative;
      totals.largest_budget = max(totals.largest_budget, budget_size);
      totals.largest_rank = max(totals.largest_rank, rank_size);
      totals.real += real[j] ? 1 : 0;
      totals.kept += kept[j] ? 1 : 0;
      signs |= budget_bits | rank_bits;
      part.budget[place] = __uint_as_float(budget_bits);
      const std::uint32_t key = kept[j] ? kKept : rank_size < kInfinityBits ? ordered(rank_bits) : kNotFinite;
      part.rank[place] = real[j] ? key : kNotReal;
    }
  });
  totals.real |= signs & kNegative;
  return totals;
}

template <typename Team>
__device__ Totals team_totals(Team& team, const Totals& mine, Shared& shared) {
  const Totals of_warp{
      __reduce_max_sync(kAllLanes, mine.largest_budget), __reduce_max_sync(kAllLanes, mine.largest_rank),
      __reduce_add_sync(kAllLanes, mine.real & ~kNegative) | __reduce_or_sync(kAllLanes, mine.real & kNegative),
      __reduce_add_sync(kAllLanes, mine.kept)};
  Totals sum{};
  const auto add = [&sum](const Totals& other) {
    const std::uint32_t real = (sum.real & ~kNegative) + (other.real & ~kNegative);
    sum = {max(sum.largest_budget, other.largest_budget), max(sum.largest_rank, other.largest_rank),
           real | ((sum.real | other.real) & kNegative), sum.kept + other.kept};
  };
  gather_warps(of_warp, kWarps, shared, add);
  const Totals of_block = sum;
  sum = {};
  team.gather(0, of_block, team.size(), add);
  return sum;
}

// Whether the budget and rank scores of the row sum to 0 although some are negative: rare, so it has a pass of its own.
template <typename Team>
__device__ Sums signed_sums(Team& team, const SelectTokensParams& params, std::int64_t b, const Part& part,
                            Shared& shared) {
  Sums mine{};
  part.each([&](int i) {
    if (part.rank[i] != kNotReal) {
      mine.budget += part.budget[i];
      mine.rank += params.rank_score[b * params.rank_stride[0] + (part.first + i) * params.rank_stride[1]];
    }
  });
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    mine.budget += __shfl_xor_sync(kAllLanes, mine.budget, mask);
    mine.rank += __shfl_xor_sync(kAllLanes, mine.rank, mask);
  }
  Sums sum{};
  const auto add = [&sum](const Sums& other) { sum = {sum.budget + other.budget, sum.rank + other.rank}; };
  gather_warps(mine, kWarps, shared, add);
  const Sums of_block = sum;
  sum = {};
  team.gather(1, of_block, team.size(), add);
  return sum;
}

// Fixed point for the row's budget scores: |score| * scale < 2**62 / tokens.
__device__ inline double fixed_point_scale(std::uint32_t largest, int tokens) {
  const int bound = static_cast<int>(largest >> 23) - 126;  // largest < 2**bound
  const int shift = 62 - bound - (32 - __clz(tokens - 1));
  return __hiloint2double((shift + 1023) << 20, 0);
}

// p: the fewest real tokens whose largest budget scores sum to tau of the total, which is positive.
template <typename Team>
__device__ int budget_by_mass(Team& team, const Part& part, const Totals& totals, const SelectTokensParams& params,
                              Shared& shared) {
  const double scale = fixed_point_scale(totals.largest_budget, params.tokens);
  const auto mass = [&](int i) { return __double2ll_rn(part.budget[i] * scale); };
  const auto need_of = [&](std::int64_t total) {
    const std::int64_t share = __double2ll_ru(__ll2double_rn(total) * params.tau);
    return max(std::int64_t{1}, min(total, share));
  };
  const Cut cut =
      descend(team, 0, part, shared, [&](int i) { return ordered(__float_as_uint(part.budget[i])); }, mass, need_of);
  int above = 0;
  part.each([&](int i) { above += ordered(__float_as_uint(part.budget[i])) > cut.key ? 1 : 0; });
  above = __reduce_add_sync(kAllLanes, above);
  int sum = 0;
  const auto add = [&sum](const Tally& other) { sum += other.above; };
  gather_warps(Tally{above, 0, {}}, kWarps, shared, add);
  const Tally of_block{sum, 0, {}};
  sum = 0;
  team.gather(2, of_block, team.size(), add);
  const std::uint32_t bits = cut.key ^ ((cut.key >> 31) != 0 ? 0x80000000U : 0xFFFFFFFFU);
  const std::int64_t value = __double2ll_rn(__uint_as_float(bits) * scale);
  return sum + static_cast<int>((cut.need - cut.above + value - 1) / value);
}

// Writes the row of index: tokens above the cut, and the first `ties` at it.
template <typename Team>
__device__ void emit(Team& team, std::int64_t b, const Part& part, std::uint32_t cut, int ties, int count,
                     const SelectTokensParams& params, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned lower_lanes = (1U << lane) - 1U;
  Tally mine{};
  part.each([&](int i) {
    const std::uint32_t key = part.rank[i];
    mine.above += key > cut ? 1 : 0;
    mine.equal += key == cut ? 1 : 0;
  });
  const Tally of_warp{__reduce_add_sync(kAllLanes, mine.above), __reduce_add_sync(kAllLanes, mine.equal), {}};
  Tally sum{}, before{};
  int w = 0;
  const auto add = [&sum](const Tally& other) {
    sum.above += other.above;
    sum.equal += other.equal;
  };
  gather_warps(of_warp, kWarps, shared, [&](const Tally& other) {
    if (w++ == warp) {
      before = sum;
    }
    add(other);
  });
  const Tally of_block = sum;
  sum = {};
  team.gather(3, of_block, team.rank(), add);
  int above_before = before.above + sum.above, equal_before = before.equal + sum.equal;
  std::int32_t* index = params.index + b * params.tokens;
  part.each([&](int i) {
    const std::uint32_t key = part.rank[i];
    const unsigned above = __ballot_sync(kAllLanes, key > cut), equal = __ballot_sync(kAllLanes, key == cut);
    const int equal_here = equal_before + __popc(equal & lower_lanes);
    if (key > cut || (key == cut && equal_here < ties)) {
      index[above_before + __popc(above & lower_lanes) + min(equal_here, ties)] = part.first + i;
    }
    if (part.first + i >= count && part.first + i < params.tokens) {
      index[part.first + i] = params.tokens;
    }
    above_before += __popc(above);
    equal_before += __popc(equal);
  });
  if (team.rank() == 0 && threadIdx.x == 0) {
    params.count[b] = count;
  }
}

// A Team is the blocks that share a row; every thread of every block makes the same calls.
//   rank(), size()
//   merge(level, bins)           adds the blocks' bins up: the sums of the two bins of this thread's `pair_of_thread`
//   gather(slot, mine, n, use)   use(value) of each block of rank below n, in that order; each slot once a row
template <typename Team>
__device__ void select_row(Team& team, std::int64_t b, const SelectTokensParams& params, Shared& shared,
                           void* tokens /* shared [2 * tokens_per_block], 4 bytes each */) {
  const Part part{static_cast<float*>(tokens), static_cast<std::uint32_t*>(tokens) + params.tokens_per_block,
                  team.rank() * params.tokens_per_block, params.tokens_per_block / kWarps};
  shared.bins.clear();
  const Totals totals = team_totals(team, load(params, b, part), shared);
  const int real = static_cast<int>(totals.real & ~kNegative);
  bool usable = totals.largest_budget < kInfinityBits && totals.largest_rank < kInfinityBits &&
                totals.largest_budget > 0 && totals.largest_rank > 0;
  bool positive = true;  // the sum of the budget scores
  if (usable && (totals.real & kNegative) != 0) {
    const Sums sums = signed_sums(team, params, b, part, shared);
    usable = sums.budget != 0 && sums.rank != 0;
    positive = sums.budget > 0;
  }
  int target = real;
  if (usable) {
    if (params.ratio > 0) {
      target = static_cast<int>(ceil(params.ratio * real));
    } else if (params.tau < 1 && positive) {  // a share of a negative sum is no bound: every token
      target = budget_by_mass(team, part, totals, params, shared);
    }
    target = min(max(max(target, totals.kept), params.min_tokens), real);
    target = target > params.dense_above * real ? real : target;
  }
  Cut cut{kNotReal, target, target};  // every real token
  if (target < real) {
    cut = descend(
        team, kLevels, part, shared, [&](int i) { return part.rank[i]; },
        [&](int i) { return std::int64_t{part.rank[i] != kNotReal}; },
        [&](std::int64_t) { return std::int64_t{target}; });
  }
  emit(team, b, part, cut.key, target - static_cast<int>(cut.above), target, params, shared);
}

}  // namespace zipvl::cuda::select
