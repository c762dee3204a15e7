// The bodies of products.h.
#include "products.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <map>
#include <vector>

namespace emulated {

template <typename T>
const float* values_of_bits() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      T narrow;
      std::memcpy(&narrow, &bits, sizeof bits);
      all[i] = static_cast<float>(narrow);
    }
    return all;
  }();
  return values.data();
}
template const float* values_of_bits<__half>();
template const float* values_of_bits<__nv_bfloat16>();

void multiply_16x8x16(const float* values_of_bits, float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                      std::uint32_t b1) {
  struct Fragments {
    float a[2][4], b[4];  // four of K, of rows eight apart
  };
  const auto value = [&](std::uint32_t pair, int half) { return values_of_bits[pair >> 16 * half & 0xFFFF]; };
  Fragments mine;
  for (int k = 0; k < 4; ++k) {
    mine.a[0][k] = value(a[k / 2 * 2], k % 2);
    mine.a[1][k] = value(a[k / 2 * 2 + 1], k % 2);
    mine.b[k] = value(k < 2 ? b0 : b1, k % 2);
  }
  const Fragments* all = Block::current_block->exchange(0xFFFFFFFFU, mine);
  const int lane = Block::thread % kWarp;
  for (int r = 0; r < 4; ++r) {
    const Fragments *row = all + lane / 4 * 4, *column = all + (lane % 4 * 2 + r % 2) * 4;
    double sum = c[r];
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 4; ++k) {
        sum += static_cast<double>(row[j].a[r / 2][k]) * column[j].b[k];
      }
    }
    c[r] = static_cast<float>(sum);
  }
}

namespace {

const unsigned char* swizzled(const unsigned char* logical) {
  const auto address = reinterpret_cast<std::uintptr_t>(logical);
  return reinterpret_cast<const unsigned char*>(address ^ (address >> 7 & 7) << 4);
}

// Of rows of 128 bytes, in which pieces lie swizzled.
void check_rows(const unsigned char* first, const unsigned char* last) {
  const auto start_of = [](const unsigned char* at) { return at - reinterpret_cast<std::uintptr_t>(at) % 128; };
  DynamicShared::check_read(start_of(first), start_of(last) + 128);
}

const unsigned char* row_along_k(const SharedOperand& from, int row) {
  return from.start + row / 8 * from.group + row % 8 * 128;
}

// Sixteen of K: of a row of 64 elements along K, in two pieces of 16 bytes.
void read_along_k(const float* values_of_bits, const SharedOperand& from, int row, float (&x)[16]) {
  std::uint16_t bits[16];
  for (int piece = 0; piece < 2; ++piece) {
    std::memcpy(bits + 8 * piece, swizzled(row_along_k(from, row) + 16 * piece), 16);
  }
  for (int k = 0; k < 16; ++k) {
    x[k] = values_of_bits[bits[k]];
  }
}

// Columns n and n + 1, n even, of rows of 64 elements along N, one a K.
void read_along_n(const float* values_of_bits, const SharedOperand& from, int n, float (&x)[2][16]) {
  for (int k = 0; k < 16; ++k) {
    const unsigned char* piece =
        swizzled(from.start + n / 64 * from.slab + k / 8 * from.group + k % 8 * 128 + n % 64 / 8 * 16);
    std::uint16_t bits[2];
    std::memcpy(bits, piece + n % 8 * 2, sizeof bits);
    x[0][k] = values_of_bits[bits[0]];
    x[1][k] = values_of_bits[bits[1]];
  }
}

// Late products of a thread into the same registers, in their order, and what they give.
struct Unfinished {
  std::vector<float> values;
  std::vector<WarpgroupProduct> products;
  std::size_t done = 0;
};
// By thread and registers. Finished ones stay: the next ones take their memory.
thread_local std::map<std::pair<int, float*>, Unfinished> unfinished;

}  // namespace

void WarpgroupProduct::multiply(float* d) const {
  const int lane = thread % kWarp, warp = thread / kWarp % 4;
  float rows[2][16], columns[2][16];
  if (a_of_lane[0] == nullptr) {
    const int row = 16 * warp + lane / 4;
    check_rows(row_along_k(a, row), row_along_k(a, row + 8));
    read_along_k(values_of_bits, a, row, rows[0]);
    read_along_k(values_of_bits, a, row + 8, rows[1]);
  } else {
    for (int k = 0; k < 32; ++k) {
      const int half = k / 16;
      rows[half][k % 16] = values_of_bits[a_of_lane[k % 8 / 2][half + 2 * (k / 8 % 2)] >> 16 * (k % 2) & 0xFFFF];
    }
  }
  check_rows(b.start, b_transposed ? b.start + (n - 1) / 64 * b.slab + b.group + 7 * 128 : row_along_k(b, n - 1));
  for (int eight = 0; eight < n / 8; ++eight, d += 4) {
    const int column = eight * 8 + 2 * (lane % 4);
    if (b_transposed) {
      read_along_n(values_of_bits, b, column, columns);
    } else {
      read_along_k(values_of_bits, b, column, columns[0]);
      read_along_k(values_of_bits, b, column + 1, columns[1]);
    }
    for (int i = 0; i < 4; ++i) {
      float sum = accumulate ? d[i] : 0.0F;
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < 16; ++k) {
        sum += rows[i / 2][k] * columns[i % 2][k];
      }
      d[i] = sum;
    }
  }
}

void WarpgroupProduct::issue(float* d) const {
  Block& block = *Block::current_block;
  if (!block.product_is_late()) {
    multiply(d);
    return;
  }
  Unfinished& late = unfinished[{thread, d}];
  if (late.products.empty()) {
    late.values.assign(d, d + n / 2);
    std::fill_n(d, n / 2, NAN);
  }
  late.products.push_back(*this);
  block.start_product([&late, d] {
    late.products[late.done++].multiply(late.values.data());
    if (late.done == late.products.size()) {
      std::copy(late.values.begin(), late.values.end(), d);
      late.products.clear();
      late.done = 0;
    }
  });
}

}  // namespace emulated
