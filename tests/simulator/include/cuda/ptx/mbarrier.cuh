#pragma once

#include "cuda/ptx/shared_address.cuh"

namespace zipvl::cuda::ptx {

// What a barrier's 64 bits hold here.
struct Mbarrier {
  std::int64_t bytes : 32;  // still to come; below 0 where they came before they were expected
  std::uint64_t expected : 12, pending : 12, phase : 1, begun : 7;
};
static_assert(sizeof(Mbarrier) == sizeof(std::uint64_t));
constexpr unsigned kBegun = 0x2A;  // poisoned memory is no barrier

inline Mbarrier& state_of(std::uint64_t* barrier) {
  auto& state = reinterpret_cast<Mbarrier&>(*barrier);
  if (state.begun != kBegun) {
    emulated::fail("a barrier is used before it is initialised");
  }
  return state;
}

// Takes arrivals and bytes off; the phase that they complete ends.
inline void advance(std::uint64_t* barrier, unsigned arrivals, std::int64_t bytes) {
  Mbarrier& state = state_of(barrier);
  if (state.pending < arrivals) {
    emulated::fail("a barrier has more arrivals than it was made for");
  }
  state.pending -= arrivals;
  state.bytes -= bytes;
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
  }
}

inline void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  reinterpret_cast<Mbarrier&>(*barrier) = {0, arrivals, arrivals, 0, kBegun};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(std::uint64_t* barrier) { advance(barrier, 1, 0); }
inline void mbarrier_arrive_expect_tx(std::uint64_t* barrier, std::uint32_t bytes) {
  state_of(barrier).bytes += bytes;
  advance(barrier, 1, 0);
}
inline void cp_async_mbarrier_arrive_noinc(std::uint64_t* barrier) {
  emulated::Block::current_block->after_copies([barrier] { advance(barrier, 1, 0); });
}
inline bool mbarrier_test_wait(std::uint64_t* barrier, std::uint32_t parity) {
  return state_of(barrier).phase != parity;
}
inline void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  emulated::Block::current_block->wait_until([=] { return mbarrier_test_wait(barrier, parity); });
}

}  // namespace zipvl::cuda::ptx
