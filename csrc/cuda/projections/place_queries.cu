// Queries of the chosen rows: bias, norm and rotary embedding on the way from the packed products to their tokens. A
// warp a head; a lane holds pairs of elements that the rotation mixes, d and d + head_dim / 2.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/dispatch.h"
#include "cuda/projections/chosen_rows.cuh"

namespace zipvl::cuda {
namespace {

using namespace projections;

constexpr int kPairsPerStep = 2;  // consecutive elements of each half a lane takes at once: 4 bytes
constexpr int kSteps = PlaceQueriesParams::kMaxHeadDim / 2 / (kWarpThreads * kPairsPerStep);

template <typename T>
struct Two;  // kPairsPerStep elements, moved at once
template <>
struct Two<__half> {
  using Vector = __half2;
  static __device__ __forceinline__ float2 floats(Vector v) { return __half22float2(v); }
  static __device__ __forceinline__ float round(float x) { return __half2float(__float2half_rn(x)); }
  static __device__ __forceinline__ Vector pack(float2 x) { return __floats2half2_rn(x.x, x.y); }
};
template <>
struct Two<__nv_bfloat16> {
  using Vector = __nv_bfloat162;
  static __device__ __forceinline__ float2 floats(Vector v) { return __bfloat1622float2(v); }
  static __device__ __forceinline__ float round(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
  static __device__ __forceinline__ Vector pack(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
};

template <typename T>
__device__ __forceinline__ float2 read(const void* base, std::int64_t at) {
  using V = Two<T>;
  return V::floats(*reinterpret_cast<const typename V::Vector*>(static_cast<const T*>(base) + at));
}

template <typename T>
__device__ __forceinline__ void add_rounded(float2& x, float2 y) {
  x = {Two<T>::round(x.x + y.x), Two<T>::round(x.y + y.y)};
}

template <typename T>
__device__ __forceinline__ void scale_rounded(float2& x, float factor, float2 weight) {
  const float a = Two<T>::round(x.x * factor), b = Two<T>::round(x.y * factor);
  x = {Two<T>::round(weight.x * a), Two<T>::round(weight.y * b)};
}

// One of the rotation's halves: round(round(x * c) + sign * round(y * s)).
template <typename T>
__device__ __forceinline__ float rotated(float x, float c, float y, float s, float sign) {
  return Two<T>::round(x * c) + sign * Two<T>::round(y * s);
}

// One head of one token; q and packed point at the head's first element, cos and sin at the token's.
template <typename T>
__device__ void place_head(const PlaceQueriesParams& params, const T* packed, std::int64_t head, const T* cos,
                           const T* sin, T* q) {
  const int half = params.head_dim / 2, first = threadIdx.x % kWarpThreads * kPairsPerStep;
  float2 low[kSteps], high[kSteps];
  float squares = 0.0F;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int d = first + step * kWarpThreads * kPairsPerStep;
    low[step] = high[step] = {0.0F, 0.0F};
    if (d < half) {
      low[step] = read<T>(packed, d);
      high[step] = read<T>(packed, d + half);
      if (params.bias != nullptr) {
        add_rounded<T>(low[step], read<T>(params.bias, head * params.head_dim + d));
        add_rounded<T>(high[step], read<T>(params.bias, head * params.head_dim + d + half));
      }
    }
    squares += low[step].x * low[step].x + low[step].y * low[step].y + high[step].x * high[step].x +
               high[step].y * high[step].y;
  }
  if (params.norm_weight != nullptr) {
    squares = warp_sum(squares);
  }
  const float factor = rsqrtf(squares / static_cast<float>(params.head_dim) + params.norm_eps);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int d = first + step * kWarpThreads * kPairsPerStep;
    if (d >= half) {
      continue;
    }
    if (params.norm_weight != nullptr) {
      scale_rounded<T>(low[step], factor, read<T>(params.norm_weight, d));
      scale_rounded<T>(high[step], factor, read<T>(params.norm_weight, d + half));
    }
    const float2 x = low[step], y = high[step];
    const float2 cos_low = read<T>(cos, d), sin_low = read<T>(sin, d);
    const float2 cos_high = read<T>(cos, d + half), sin_high = read<T>(sin, d + half);
    using V = Two<T>;
    *reinterpret_cast<typename V::Vector*>(q + d) =
        V::pack({rotated<T>(x.x, cos_low.x, y.x, sin_low.x, -1.0F), rotated<T>(x.y, cos_low.y, y.y, sin_low.y, -1.0F)});
    *reinterpret_cast<typename V::Vector*>(q + d + half) = V::pack(
        {rotated<T>(y.x, cos_high.x, x.x, sin_high.x, 1.0F), rotated<T>(y.y, cos_high.y, x.y, sin_high.y, 1.0F)});
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) place_queries_kernel(const __grid_constant__ PlaceQueriesParams params) {
  const ChosenRows& chosen = params.chosen;
  const std::int64_t row_size = params.heads * params.head_dim;
  for (std::int64_t b = blockIdx.y; b < chosen.batch; b += gridDim.y) {
    const PlacesInChunk places = places_in_chunk(chosen, b);
    const std::int64_t tasks = (places.end - places.begin) * params.heads;
    const std::int64_t step = std::int64_t{gridDim.x} * kWarps;
    for (std::int64_t task = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpThreads; task < tasks;
         task += step) {
      const std::int64_t row = task / params.heads, head = task - row * params.heads, place = places.begin + row;
      const std::int64_t token = token_of(chosen, b, place);
      if (token >= 0) {
        const std::int64_t packed = (places.shift + place) * row_size + head * params.head_dim;
        place_head<T>(params, static_cast<const T*>(params.packed) + packed, head,
                      static_cast<const T*>(params.cos) + b * params.cos_stride[0] + token * params.cos_stride[1],
                      static_cast<const T*>(params.sin) + b * params.sin_stride[0] + token * params.sin_stride[1],
                      static_cast<T*>(params.q) + (b * chosen.tokens + token) * row_size + head * params.head_dim);
      }
    }
  }
}

}  // namespace

cudaError_t launch_place_queries(const PlaceQueriesParams& params, cudaStream_t stream) {
  const dim3 grid = grid_of(params.chosen, params.heads, params.num_sms);
  return dispatch_element(params.element, [&]<typename ElementType>() {
    place_queries_kernel<ElementType><<<grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace zipvl::cuda
