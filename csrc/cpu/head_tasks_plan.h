// Into how many tasks work on the CPU is split, each with as many key/value heads.
#pragma once

#include <cstdint>

namespace zipvl::plan {

// One task a head where the threads share the heads evenly or nearly so; one task of all heads otherwise, whose matrix
// products then use the threads themselves.
constexpr std::int64_t head_tasks(std::int64_t kv_heads, std::int64_t threads) {
  const bool even = threads > 1 && kv_heads % threads == 0;
  const bool nearly_even = threads > 1 && kv_heads >= 4 * threads;
  return even || nearly_even ? kv_heads : 1;
}

}  // namespace zipvl::plan
