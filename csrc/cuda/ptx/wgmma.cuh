// Warpgroup matrix products (wgmma, sm_90a): D[64, N] (+)= A[64, 16] B[16, N], float32 accumulators, float16 or
// bfloat16 operands. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
//
// Accumulator d[N / 2] of a thread: element 4 * j + 2 * i + c stands at row 16 * warp + lane / 4 + 8 * i and column
// 8 * j + 2 * (lane % 4) + c, warp being the warp's place in its warpgroup. Fragment a[4] of A from registers: two
// packed elements each of row lane / 4 + 8 * (i % 2) of the warp's 16 and columns 2 * (lane % 4) + 8 * (i / 2) + {0,
// 1}.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::ptx {

// Orders the warpgroup's register and shared memory accesses before the products that follow.
__device__ __forceinline__ void warpgroup_arrive() { cute::warpgroup_arrive(); }

// Closes the group of products issued so far.
__device__ __forceinline__ void warpgroup_commit_batch() { cute::warpgroup_commit_batch(); }

// Waits until at most `Pending` groups are unfinished.
template <int Pending>
__device__ __forceinline__ void warpgroup_wait() {
  cute::warpgroup_wait<Pending>();
}

// Keeps the compiler from moving uses of the registers of an unfinished product across this place.
template <int Count>
__device__ __forceinline__ void warpgroup_fence_operand(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    cute::warpgroup_fence_operand(d[i]);
  }
}

// Descriptor of an operand in shared memory under the 128-byte swizzle; `tile` is aligned to 1024 bytes (or advanced
// within the first 128-byte row of such a tile, or by whole groups of eight rows).
//   K-major (rows of 64 contiguous elements along K): `group_bytes` = 1024, distance of groups of eight rows;
//     `slab_bytes` unused.
//   MN-major (rows of 64 contiguous elements along M or N, one row a K): `group_bytes` = 1024, distance of groups of
//     eight K; `slab_bytes` = distance of slabs of 64 along M or N.
// In arithmetic: CuTe's GmmaDescriptor, which is the same in bit fields, gives other machine code.
__device__ __forceinline__ std::uint64_t wgmma_descriptor(const void* tile, std::uint32_t group_bytes = 1024,
                                                          std::uint32_t slab_bytes = 16) {
  const std::uint32_t address = shared_address(tile);
  return static_cast<std::uint64_t>((address & 0x3FFFFU) >> 4) | (static_cast<std::uint64_t>(slab_bytes >> 4) << 16) |
         (static_cast<std::uint64_t>(group_bytes >> 4) << 32) | (std::uint64_t{1} << 62);
}

// Moves a descriptor's start by `bytes`. The start stands in the low word, which never carries into the high one;
// saying so spares the compiler 64-bit additions.
__device__ __forceinline__ std::uint64_t wgmma_advance(std::uint64_t descriptor, std::uint32_t bytes) {
  const std::uint32_t low = static_cast<std::uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xFFFFFFFF00000000U) | low;
}

// CuTe's atoms by type and columns. BTransposed: B is MN-major (its rows run along N). A from shared memory (SS) or
// registers (RS).
template <typename T, int N, bool BTransposed>
struct WgmmaAtoms;

#define ZIPVL_WGMMA_ATOMS(T, N, NAME)                                             \
  template <bool BTransposed>                                                     \
  struct WgmmaAtoms<T, N, BTransposed> {                                          \
    static constexpr auto kA = cute::SM90::GMMA::Major::K;                        \
    static constexpr auto kB = static_cast<cute::SM90::GMMA::Major>(BTransposed); \
    using SS = cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##NAME##_SS<kA, kB>;    \
    using RS = cute::SM90::GMMA::MMA_64x##N##x16_F32##NAME##NAME##_RS<kA, kB>;    \
  };
ZIPVL_WGMMA_ATOMS(__half, 16, F16)
ZIPVL_WGMMA_ATOMS(__half, 64, F16)
ZIPVL_WGMMA_ATOMS(__half, 96, F16)
ZIPVL_WGMMA_ATOMS(__half, 128, F16)
ZIPVL_WGMMA_ATOMS(__half, 256, F16)
ZIPVL_WGMMA_ATOMS(__nv_bfloat16, 16, BF16)
ZIPVL_WGMMA_ATOMS(__nv_bfloat16, 64, BF16)
ZIPVL_WGMMA_ATOMS(__nv_bfloat16, 96, BF16)
ZIPVL_WGMMA_ATOMS(__nv_bfloat16, 128, BF16)
ZIPVL_WGMMA_ATOMS(__nv_bfloat16, 256, BF16)
#undef ZIPVL_WGMMA_ATOMS

// T: __half or __nv_bfloat16. N: columns. `accumulate` 0: D = A B.
template <typename T, int N, bool BTransposed>
struct Wgmma {
  using Atoms = WgmmaAtoms<T, N, BTransposed>;
  using ScaleOut = cute::SM90::GMMA::ScaleOut;

  __device__ __forceinline__ static void ss(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, int accumulate) {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      Atoms::SS::fma(a, b, d[I]..., static_cast<ScaleOut>(accumulate));
    }(std::make_index_sequence<N / 2>{});
  }

  __device__ __forceinline__ static void rs(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                                            int accumulate) {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      Atoms::RS::fma(a[0], a[1], a[2], a[3], b, d[I]..., static_cast<ScaleOut>(accumulate));
    }(std::make_index_sequence<N / 2>{});
  }
};

}  // namespace zipvl::cuda::ptx
