#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>

#include "cuda/ptx/values.h"

namespace zipvl::cuda::ptx {

// A product happens when it is issued or when it is waited for, all lanes of a warp at their own time. Until then the
// registers of its result are NaN, and the true ones are here; a warp's registers of A are read where they are.
struct Unfinished {
  std::vector<float> values;
  int products = 0;
};
inline std::map<std::pair<int, float*>, Unfinished>& unfinished() {
  static std::map<std::pair<int, float*>, Unfinished> all;
  return all;
}

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

struct Operand {
  const unsigned char* start;
  std::ptrdiff_t group, slab;

  explicit Operand(std::uint64_t descriptor)
      : start(shared_pointer(static_cast<std::uint32_t>(descriptor) << 4)),
        group((descriptor >> 32 & 0xFFFF) * 16),
        slab((descriptor >> 48) * 16) {}

  static const unsigned char* swizzled(const unsigned char* logical) {
    const auto address = reinterpret_cast<std::uintptr_t>(logical);
    return reinterpret_cast<const unsigned char*>(address ^ (address >> 7 & 7) << 4);
  }
  // A row's elements of 16 K, in two pieces of 16 bytes: rows of 64 elements along K.
  void along_k(int row, std::uint16_t (&bits)[16]) const {
    for (int piece = 0; piece < 2; ++piece) {
      std::memcpy(bits + 8 * piece, swizzled(start + row / 8 * group + row % 8 * 128 + 16 * piece), 16);
    }
  }
  // Rows of 64 elements along N, one a K.
  void along_n(int n, std::uint16_t (&bits)[16]) const {
    for (int k = 0; k < 16; ++k) {
      std::memcpy(bits + k, swizzled(start + n / 64 * slab + k / 8 * group + k % 8 * 128 + n % 64 * 2), 2);
    }
  }
};

template <typename T, int N, bool BTransposed>
struct Wgmma {
  static constexpr int kValues = N / 2;

  static void ss(float (&d)[kValues], std::uint64_t a, std::uint64_t b, int accumulate) {
    const int warp = emulated::Block::thread / 32 % 4, lane = lane_of_thread();
    issue(d, b, accumulate,
          [=](int half, std::uint16_t (&bits)[16]) { Operand(a).along_k(16 * warp + lane / 4 + 8 * half, bits); });
  }

  static void rs(float (&d)[kValues], const std::uint32_t (&a)[4], std::uint64_t b, int accumulate) {
    struct Quad {
      const std::uint32_t* of_lane[4];
    };
    const auto* of_warp = emulated::Block::current_block->exchange(0xFFFFFFFFU, &a[0]);
    Quad quad;
    std::copy_n(of_warp + lane_of_thread() / 4 * 4, 4, quad.of_lane);
    issue(d, b, accumulate, [=](int half, std::uint16_t (&bits)[16]) {
      for (int k = 0; k < 16; ++k) {
        bits[k] = static_cast<std::uint16_t>(quad.of_lane[k % 8 / 2][half + 2 * (k / 8)] >> 16 * (k % 2));
      }
    });
  }

 private:
  template <typename A>
  static void issue(float* d, std::uint64_t b, int accumulate, const A& a) {
    auto& block = *emulated::Block::current_block;
    const int lane = lane_of_thread();
    // Its own arrays are not looked at; what it reads of shared memory is.
    const auto multiply = [=](float* values) __attribute__((no_sanitize_address)) {
      const Operand operand(b);
      std::uint16_t bits[16];
      float rows[2][16], column[16];
      for (int half = 0; half < 2; ++half) {
        a(half, bits);
        for (int k = 0; k < 16; ++k) {
          rows[half][k] = value_of<T>(bits[k]);
        }
      }
      for (int i = 0; i < N / 4; ++i) {
        const int n = i / 2 * 8 + 2 * (lane % 4) + i % 2;
        BTransposed ? operand.along_n(n, bits) : operand.along_k(n, bits);
        for (int k = 0; k < 16; ++k) {
          column[k] = value_of<T>(bits[k]);
        }
        for (int half = 0; half < 2; ++half) {
          float& value = values[i / 2 * 4 + 2 * half + i % 2];
          float sum = accumulate ? value : 0.0F;
          for (int k = 0; k < 16; ++k) {
            sum += rows[half][k] * column[k];
          }
          value = sum;
        }
      }
    };
    if (block.product_is_late()) {
      const auto key = std::make_pair(emulated::Block::thread, d);
      Unfinished& result = unfinished()[key];
      if (result.products++ == 0) {
        result.values.assign(d, d + kValues);
        std::fill_n(d, kValues, NAN);
      }
      block.start_product([=] {
        Unfinished& of = unfinished().at(key);
        multiply(of.values.data());
        if (--of.products == 0) {
          std::copy_n(of.values.data(), kValues, d);
          unfinished().erase(key);
        }
      });
    } else {
      multiply(d);
    }
    __syncwarp();
  }
};

}  // namespace zipvl::cuda::ptx
