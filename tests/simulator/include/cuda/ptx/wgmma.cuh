#pragma once

#include "cuda/ptx/scalar.cuh"
#include "products.h"

namespace zipvl::cuda::ptx {

inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { emulated::Block::current_block->commit_products(); }
template <int Pending>
void warpgroup_wait() {
  __syncwarp();
  emulated::Block::current_block->finish_products(Pending);
  __syncwarp();  // nobody's registers change before all have read them
}
template <int Count>
void warpgroup_fence_operand(float (&)[Count]) {}

// Low word: the address in units of 16 bytes. High word: both distances likewise.
inline std::uint64_t wgmma_descriptor(const void* tile, std::uint32_t group_bytes = 1024,
                                      std::uint32_t slab_bytes = 16) {
  return std::uint64_t{shared_address(tile) >> 4} | std::uint64_t{group_bytes >> 4} << 32 |
         std::uint64_t{slab_bytes >> 4} << 48;
}
inline std::uint64_t wgmma_advance(std::uint64_t descriptor, std::uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000U) | static_cast<std::uint32_t>(descriptor + (bytes >> 4));
}

inline emulated::SharedOperand operand_of(std::uint64_t descriptor) {
  return {shared_pointer(static_cast<std::uint32_t>(descriptor) << 4),
          static_cast<std::ptrdiff_t>(descriptor >> 32 & 0xFFFF) * 16,
          static_cast<std::ptrdiff_t>(descriptor >> 48) * 16};
}

template <typename T, int N, bool BTransposed>
struct Wgmma {
  static constexpr int kValues = N / 2;

  static void ss(float (&d)[kValues], std::uint64_t a, std::uint64_t b, int accumulate) {
    product(b, accumulate, operand_of(a), {}).issue(d);
    __syncwarp();
  }

  static void rs(float (&d)[kValues], const std::uint32_t (&a)[4], std::uint64_t b, int accumulate) {
    const auto* of_warp = emulated::Block::current_block->exchange(0xFFFFFFFFU, &a[0]) + lane_of_thread() / 4 * 4;
    product(b, accumulate, {}, {of_warp[0], of_warp[1], of_warp[2], of_warp[3]}).issue(d);
    __syncwarp();
  }

 private:
  static emulated::WarpgroupProduct product(std::uint64_t b, int accumulate, emulated::SharedOperand a,
                                            std::array<const std::uint32_t*, 4> a_of_lane) {
    return {emulated::values_of_bits<T>(),
            N,
            emulated::Block::thread,
            accumulate != 0,
            BTransposed,
            a,
            operand_of(b),
            a_of_lane};
  }
};

}  // namespace zipvl::cuda::ptx
