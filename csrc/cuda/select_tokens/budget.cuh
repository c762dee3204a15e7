// How many tokens: the fewest whose budget scores reach a share of their sum (top-p over attention mass).
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/select_tokens/radix_select.cuh"

namespace zipvl::cuda::select_tokens {

struct Sums {
  double budget, rank;
};

// use(value) of each of the first n warps' `mine`, in order, in every thread.
template <typename T, typename Use>
__device__ void all_gather_warps(const T& mine, int n, Shared& shared, const Use& use) {
  static_assert(sizeof(T) == sizeof(uint4));
  if (threadIdx.x % kWarpThreads == 0) {
    memcpy(&shared.records[threadIdx.x / kWarpThreads], &mine, sizeof(T));
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < n; ++w) {
    T record;
    memcpy(&record, &shared.records[w], sizeof(T));
    use(record);
  }
}

// The sums of the row's scores where some are negative: rare, so it has a pass of its own over memory.
template <int kItems, typename Group>
__device__ Sums signed_sums(Group& group, const SelectTokensParams& params, std::int64_t b, const Keys<kItems>& keys,
                            int first, Shared& shared) {
  Sums mine{};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const std::int64_t n = first + Keys<kItems>::place(i / 4) + i % 4;
    if (keys.rank[i] != kNotReal) {
      mine.budget += params.budget_score[b * params.budget_stride[0] + n * params.budget_stride[1]];
      mine.rank += params.rank_score[b * params.rank_stride[0] + n * params.rank_stride[1]];
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    mine.budget += __shfl_xor_sync(kAllLanes, mine.budget, mask);
    mine.rank += __shfl_xor_sync(kAllLanes, mine.rank, mask);
  }
  Sums sum{};
  const auto add = [&sum](const Sums& other) { sum = {sum.budget + other.budget, sum.rank + other.rank}; };
  all_gather_warps(mine, kWarps, shared, add);
  const Sums of_block = sum;
  sum = {};
  group.all_gather(0, of_block, group.size(), add);
  return sum;
}

// 2**exponent.
__device__ inline double power_of_two(int exponent) { return __hiloint2double((exponent + 1023) << 20, 0); }

// p: the fewest real tokens whose largest budget scores sum to tau of the total. `sum`: the total where scores are
// negative; else null. A bucket's mass is an exact integer of 44 bits, shifted to the unit of the row's highest bucket:
// sums then stay below 2**62, and buckets so far below the highest that bits fall off are rounded, each to half a unit,
// which is less than 2**-61 * tokens of the largest score.
template <int kItems, typename Group>
__device__ int budget_by_mass(Group& group, const Keys<kItems>& keys, const ThreadBuckets& buckets, int top,
                              const Sums* sum, const SelectTokensParams& params, MassHistogram* mass_histogram,
                              Shared& shared) {
  const int top_exponent = max(top / 8, 1);
  const int widest = 38 - (32 - __clz(params.tokens - 1));
  const int first = bucket_quad() * kBucketsPerThread;
  // Groups of four buckets share an exponent.
  const int shift = widest - top_exponent + max(first / 8, 1);
  std::uint64_t mass[kBucketsPerThread], masses = 0;
  std::uint32_t counts = 0;
#pragma unroll
  for (int i = 0; i < kBucketsPerThread; ++i) {
    mass[i] = std::uint64_t{buckets.count[i]} * mass_of(static_cast<std::uint32_t>(first + i) << kTopDigitShift) +
              buckets.low[i];
    counts += buckets.count[i];
  }
  if (shift >= 0) {
#pragma unroll
    for (int i = 0; i < kBucketsPerThread; ++i) {
      mass[i] <<= shift;
      masses += mass[i];
    }
  } else if (counts != 0) {
#pragma unroll
    for (int i = 0; i < kBucketsPerThread; ++i) {
      mass[i] = shift < -60 ? 0 : (mass[i] + (std::uint64_t{1} << (-shift - 1))) >> -shift;
      masses += mass[i];
    }
  }
  const ExclusiveSum prefix = exclusive_sum<true>(masses, counts, shared.scan);
  const double total =
      sum == nullptr ? __ull2double_rn(prefix.mass_total) : sum->budget * power_of_two(widest + 150 - top_exponent);
  const std::uint64_t share = __double2ull_ru(total * params.tau);
  const std::uint64_t need = max(std::uint64_t{1}, min(prefix.mass_total, share));
  std::uint64_t before = prefix.mass;
  std::uint32_t above = prefix.count;
  if (before < need && need <= before + masses) {
#pragma unroll
    for (int i = kBucketsPerThread - 1; i >= 0; --i) {
      if (before < need && need <= before + mass[i]) {
        const std::uint64_t rest = need - before;
        // In units of the bucket's own keys, whose sum rounds to at least `rest`.
        const std::uint64_t exact = shift >= 0 ? (rest + (std::uint64_t{1} << shift) - 1) >> shift
                                               : (rest << -shift) - (std::uint64_t{1} << (-shift - 1));
        shared.threshold = {exact, static_cast<std::uint32_t>(first + i) << kTopDigitShift, kTopBucketSpan, above,
                            buckets.count[i]};
      }
      before += mass[i];
      above += buckets.count[i];
    }
  }
  __syncthreads();
  const ThresholdBucket threshold = radix_select<true>(group, keys.budget, shared.threshold, mass_histogram, shared);
  __syncthreads();  // every thread has read the threshold, and the ranks' may be written
  const std::uint64_t value = mass_of(threshold.lo);
  const std::uint64_t ties =
      threshold.need <= value ? 1 : (threshold.need + value - 1) / value;  // rarely a division of 64 bits
  return static_cast<int>(threshold.above + ties);
}

}  // namespace zipvl::cuda::select_tokens
