#pragma once

#include "cuda/ptx/scalar.cuh"
#include "products.h"

namespace zipvl::cuda::ptx {

template <typename Element>
void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated::multiply_16x8x16(emulated::values_of_bits<Element>(), c, a, b0, b1);
}

// Rows of the eight by eight matrices of ldmatrix, an address a lane.
inline const std::uint32_t* matrix_rows(std::uint32_t address) {
  if (reinterpret_cast<std::uintptr_t>(shared_pointer(address)) % 16 != 0) {
    emulated::fail("a row of ldmatrix is not aligned to 16 bytes");
  }
  return emulated::Block::current_block->exchange(0xFFFFFFFFU, address);
}

inline std::uint16_t element_at(std::uint32_t address) {
  std::uint16_t bits;
  std::memcpy(&bits, shared_pointer(address), sizeof bits);
  return bits;
}

// A load is the whole warp's: no lane goes on, and lets somebody overwrite what stands there, before all have read.
inline void ldmatrix(std::uint32_t (&x)[4], std::uint32_t address) {
  const std::uint32_t* rows = matrix_rows(address);
  const int i = lane_of_thread() / 4, j = lane_of_thread() % 4;
  for (int m = 0; m < 4; ++m) {
    const std::uint32_t row = rows[8 * m + i];
    x[m] = element_at(row + 4 * j) | static_cast<std::uint32_t>(element_at(row + 4 * j + 2)) << 16;
  }
  __syncwarp();
}

inline void ldmatrix_trans(std::uint32_t (&x)[4], std::uint32_t address) {
  const std::uint32_t* rows = matrix_rows(address);
  const int i = lane_of_thread() / 4, j = lane_of_thread() % 4;
  for (int m = 0; m < 4; ++m) {
    x[m] = element_at(rows[8 * m + 2 * j] + 2 * i) |
           static_cast<std::uint32_t>(element_at(rows[8 * m + 2 * j + 1] + 2 * i)) << 16;
  }
  __syncwarp();
}

inline void stmatrix(std::uint32_t address, const std::uint32_t (&x)[4]) {
  const std::uint32_t* rows = matrix_rows(address);
  const int i = lane_of_thread() / 4, j = lane_of_thread() % 4;
  for (int m = 0; m < 4; ++m) {
    std::memcpy(shared_pointer(rows[8 * m + i] + 4 * j), &x[m], sizeof x[m]);
  }
}

inline std::uint32_t movmatrix_trans(std::uint32_t x) {
  const std::uint32_t* all = emulated::Block::current_block->exchange(0xFFFFFFFFU, x);
  const int i = lane_of_thread() / 4, j = lane_of_thread() % 4;
  const auto at = [&](int row, int column) { return all[4 * row + column / 2] >> 16 * (column % 2) & 0xFFFFU; };
  return at(2 * j, i) | at(2 * j + 1, i) << 16;
}

}  // namespace zipvl::cuda::ptx
