// Matrix products of tensor cores, whose arithmetic is in products.cpp, which no sanitizer slows down.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "blocks.h"

namespace emulated {

// The floats that 16 bits stand for, by those bits: T is __half or __nv_bfloat16.
template <typename T>
const float* values_of_bits();

// A warp's product of 16 x 16 and 16 x 8: registers as those of mma.sync.
void multiply_16x8x16(const float* values_of_bits, float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                      std::uint32_t b1);

// An operand of a warpgroup's product in shared memory, swizzled in rows of 128 bytes.
struct SharedOperand {
  const unsigned char* start;
  std::ptrdiff_t group, slab;  // bytes from eight rows to the next eight, and from 64 columns to the next 64
};

// One lane's share of a warpgroup's product of 64 x 16 and 16 x n.
struct WarpgroupProduct {
  const float* values_of_bits;
  int n, thread;
  bool accumulate, b_transposed;
  SharedOperand a, b;
  // Instead of `a`: registers of the four lanes that hold the same rows, read where they are.
  std::array<const std::uint32_t*, 4> a_of_lane;

  void multiply(float* d) const;
  // Happens at once or when it is waited for, all lanes of a warp at their own time. Until then d is NaN.
  void issue(float* d) const;
};

}  // namespace emulated
