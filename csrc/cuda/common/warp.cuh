// Warps and warpgroups, what the four lanes that share rows of an accumulator (a quad) do together, and how
// floats become elements and operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace zipvl::cuda {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The sum of all lanes' x, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// A float rounded to an element.
__device__ __forceinline__ void store_element(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store_element(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_element(float* to, float x) { *to = x; }

// Two floats rounded to adjacent elements of 16 bits.
template <typename Element>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
template <>
__device__ __forceinline__ std::uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

// The two floats of a pair of elements, the low half first.
template <typename Element>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(std::uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(std::uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

}  // namespace zipvl::cuda
