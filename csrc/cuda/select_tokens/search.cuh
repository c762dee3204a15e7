// Where a sum over keys, from the highest down, reaches what is needed: among bins, and among a few keys.
#pragma once

#include <cstdint>

#include "cuda/select_tokens/bins.cuh"

namespace zipvl::cuda::select {

// 24 bits; keys of one exponent differ by as much as their masses.
__device__ inline std::uint32_t mass_of(std::uint32_t key) {
  return (key & 0x7FFFFFU) | (key >= 0x800000U ? 0x800000U : 0U);
}

struct Prefix {
  std::uint64_t mass, mass_total;  // of the threads before this one; of all
  std::uint32_t count;
};

// Sums over the threads before this one. kMass: else `mass` is 0 throughout.
template <bool kMass>
__device__ Prefix prefix_of(std::uint64_t mass, std::uint32_t count, Scan& scan) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
  Prefix prefix{masses - mass, 0, counts - count};
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

// One more level of a descent: the four bins' keys begin at cut.lo + (bin << shift). Returns the bin's range.
template <bool kMass>
__device__ Cut search(const Four& four, const Cut& cut, int shift, Shared& shared) {
  const std::uint32_t first = cut.lo + (static_cast<std::uint32_t>(group_of_thread() * kBinsEach) << shift);
  std::uint64_t mass[kBinsEach], masses = 0;
  std::uint32_t count[kBinsEach], counts = 0;
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) {
    count[i] = kMass ? four.count[i] : four.rank[i];
    mass[i] = kMass ? std::uint64_t{count[i]} * mass_of(first + (i << shift)) + four.low[i] : count[i];
    masses += mass[i];
    counts += count[i];
  }
  const Prefix prefix = prefix_of<kMass>(masses, counts, shared.scan);
  std::uint64_t before = kMass ? prefix.mass : prefix.count;
  std::uint32_t above = cut.above + prefix.count;
  if (before < cut.need && cut.need <= before + masses) {
#pragma unroll
    for (int i = kBinsEach - 1; i >= 0; --i) {
      if (before < cut.need && cut.need <= before + mass[i]) {
        const std::uint32_t lo = first + (i << shift);
        shared.cut = {cut.need - before, lo, min((1U << shift) - 1U, cut.lo + cut.span - lo), above, count[i]};
      }
      before += mass[i];
      above += count[i];
    }
  }
  __syncthreads();
  return shared.cut;
}

// The key itself, among the at most kMaxPaired keys of the cut; four threads compare one with all.
template <bool kMass>
__device__ Cut search_pairs(const std::uint32_t* keys, const Cut& cut, Shared& shared) {
  const int i = static_cast<int>(threadIdx.x) / 4, keys_inside = static_cast<int>(cut.inside);
  if (static_cast<int>(threadIdx.x) / 32 * 8 < keys_inside) {  // whole warps
    const std::uint32_t mine = keys[min(i, keys_inside - 1)];
    std::uint32_t mass = 0, greater = 0, equal = 0, equal_before = 0;  // kMaxPaired masses of 24 bits
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
    if (i < keys_inside && threadIdx.x % 4 == 0 && equal_before == 0 && before < cut.need && cut.need <= through) {
      shared.cut = {cut.need - before, mine, 0, cut.above + greater, equal};
    }
  }
  __syncthreads();
  return shared.cut;
}

}  // namespace zipvl::cuda::select
