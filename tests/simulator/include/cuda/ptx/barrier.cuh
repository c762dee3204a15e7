#pragma once

#include "cuda/ptx/scalar.cuh"

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
inline void fence_barrier_init() {}
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
  const auto is_over = [](void* of, std::int64_t of_parity) {
    return mbarrier_test_wait(static_cast<std::uint64_t*>(of), static_cast<std::uint32_t>(of_parity));
  };
  emulated::Block::current_block->wait_until(is_over, barrier, parity);
}

inline std::uint32_t cluster_rank() { return static_cast<std::uint32_t>(emulated::Block::current_block->rank()); }
inline std::uint32_t cluster_size() {
  return static_cast<std::uint32_t>(emulated::Block::current_block->cluster_size());
}
inline void cluster_arrive() { emulated::Block::current_block->arrive_cluster(); }
inline void cluster_wait() { emulated::Block::current_block->wait_cluster(); }

// The block in the highest bits, the offset in the others.
constexpr int kOffsetBits = 24;

inline std::uint32_t shared_address_in(const void* pointer, std::uint32_t rank) {
  const auto offset = static_cast<std::int32_t>(shared_address(pointer));
  if (offset != offset << (32 - kOffsetBits) >> (32 - kOffsetBits)) {
    emulated::fail("shared memory is larger than an address here");
  }
  return rank << kOffsetBits | (static_cast<std::uint32_t>(offset) & ((1U << kOffsetBits) - 1U));
}
inline unsigned char* pointer_in_cluster(std::uint32_t address) {
  const std::int32_t offset = static_cast<std::int32_t>(address << (32 - kOffsetBits)) >> (32 - kOffsetBits);
  return emulated::Block::current_block->in_block(static_cast<int>(address >> kOffsetBits), offset);
}

inline void named_barrier_sync(int id, int threads) { emulated::Block::current_block->synchronize_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulated::Block::current_block->arrive_named(id, threads); }
template <int Registers>
void warpgroup_reg_alloc() {}
template <int Registers>
void warpgroup_reg_dealloc() {}

}  // namespace zipvl::cuda::ptx
