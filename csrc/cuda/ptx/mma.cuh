// Matrix products of one warp (mma.sync m16n8k16, sm_80), the loads of their operands (ldmatrix), and stores of the
// kind (stmatrix).
//
// A [16, 16]: a[0] rows 0-7, columns 0-7; a[1] rows 8-15; a[2], a[3] the same of columns 8-15. B [16, 8]: b0 rows 0-7,
// b1 rows 8-15. C [16, 8]: c[0], c[1] are columns 2 (lane % 4) and the next of row lane / 4; c[2], c[3] of row + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::ptx {

// c += a * b
template <typename Element>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                            std::uint32_t b1) {
  static_assert(std::is_same_v<Element, __half> || std::is_same_v<Element, __nv_bfloat16>);
  using Atom = std::conditional_t<std::is_same_v<Element, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                  cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

// CuTe's loads take a reference into shared memory.
__device__ __forceinline__ const cute::uint128_t& shared_row(std::uint32_t address) {
  return *static_cast<const cute::uint128_t*>(__cvta_shared_to_generic(address));
}

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the shared address of row l % 8 of matrix l / 8 (16 bytes,
// aligned) and gets, of each matrix, columns 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void ldmatrix(std::uint32_t (&x)[4], std::uint32_t address) {
  ordered([&] { cute::SM75_U32x4_LDSM_N::copy(shared_row(address), x[0], x[1], x[2], x[3]); });
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_trans(std::uint32_t (&x)[4], std::uint32_t address) {
  ordered([&] { cute::SM75_U16x8_LDSM_T::copy(shared_row(address), x[0], x[1], x[2], x[3]); });
}

// Four 8 x 8 matrices of 16-bit elements into shared memory, held and addressed as ldmatrix gives them (sm_90).
__device__ __forceinline__ void stmatrix(std::uint32_t address, const std::uint32_t (&x)[4]) {
  auto& row = *static_cast<cute::uint128_t*>(__cvta_shared_to_generic(address));
  ordered([&] { cute::SM90_U32x4_STSM_N::copy(x[0], x[1], x[2], x[3], row); });
}

// One 8 x 8 matrix of 16-bit elements, of which each lane holds columns 2 (lane % 4) and the next of row lane / 4,
// transposed.
__device__ __forceinline__ std::uint32_t movmatrix_trans(std::uint32_t x) {
  std::uint32_t transposed;
  cute::SM75_U32x1_MOVM_T::copy(x, transposed);
  return transposed;
}

}  // namespace zipvl::cuda::ptx
