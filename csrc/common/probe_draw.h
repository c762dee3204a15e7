// Which earlier tokens become random probes: a pure function of (seed, stratum, number of earlier tokens), the same
// bits on the CPU, on CUDA and in zipvl/reference.py (ZipVL Sec. A; docs/ops.md, step 1).
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zipvl {

// The finaliser of MurmurHash3: a bijection of 32-bit words in which every input bit reaches every output bit.
ZIPVL_HOST_DEVICE constexpr std::uint32_t fmix32(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6BU;
  x ^= x >> 13;
  x *= 0xC2B2AE35U;
  x ^= x >> 16;
  return x;
}

ZIPVL_HOST_DEVICE constexpr std::uint32_t hash32(std::uint64_t seed, std::uint32_t stratum, std::uint32_t earlier) {
  constexpr std::uint32_t kGolden = 0x9E3779B9U;
  std::uint32_t h = 0;
  h = fmix32((h ^ static_cast<std::uint32_t>(seed)) + kGolden);
  h = fmix32((h ^ static_cast<std::uint32_t>(seed >> 32)) + kGolden);
  h = fmix32((h ^ stratum) + kGolden);
  h = fmix32((h ^ earlier) + kGolden);
  return h;
}

// The rank, among `earlier` tokens, drawn from stratum `i` of `strata`; needs i < strata < earlier.
ZIPVL_HOST_DEVICE constexpr std::int64_t drawn_rank(std::uint64_t seed, std::int64_t i, std::int64_t strata,
                                                    std::int64_t earlier) {
  const std::int64_t low = i * earlier / strata;
  const std::int64_t high = (i + 1) * earlier / strata;
  const std::uint64_t hash = hash32(seed, static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(earlier));
  return low + static_cast<std::int64_t>((hash * static_cast<std::uint64_t>(high - low)) >> 32);
}

// How the `real` tokens of one row become probes: ranks [0, earlier) may be drawn, ranks [earlier, real) are recent.
struct ProbeSplit {
  std::int64_t earlier;  // real tokens before the recent ones
  std::int64_t random;   // probes drawn among them
  std::int64_t recent;   // recent probes
};

ZIPVL_HOST_DEVICE constexpr ProbeSplit split_probes(std::int64_t real, std::int64_t num_recent,
                                                    std::int64_t num_random) {
  const std::int64_t recent = real < num_recent ? real : num_recent;
  const std::int64_t earlier = real - recent;
  return {earlier, earlier < num_random ? earlier : num_random, recent};
}

// Rank of probe `slot` (0 <= slot < split.random + split.recent); slots go up in rank.
ZIPVL_HOST_DEVICE constexpr std::int64_t probe_rank(const ProbeSplit& split, std::uint64_t seed,
                                                    std::int64_t num_random, std::int64_t slot) {
  if (slot >= split.random) {
    return split.earlier + (slot - split.random);
  }
  return split.earlier <= num_random ? slot : drawn_rank(seed, slot, num_random, split.earlier);
}

// A row's draw.
struct ProbeDraw {
  ProbeSplit split;
  std::uint64_t seed;
  std::int64_t num_random;

  // Rank of probe `slot`, which is its position in a row of real tokens alone; -1 where the row has no such probe.
  ZIPVL_HOST_DEVICE constexpr std::int64_t rank(std::int64_t slot) const {
    return slot < split.random + split.recent ? probe_rank(split, seed, num_random, slot) : -1;
  }
};

ZIPVL_HOST_DEVICE constexpr ProbeDraw draw_probes(std::int64_t real, std::int64_t num_recent, std::int64_t num_random,
                                                  std::uint64_t seed) {
  return {split_probes(real, num_recent, num_random), seed, num_random};
}

}  // namespace zipvl
