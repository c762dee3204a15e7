// Device code on a CPU: enough of CUDA's language to run kernels of csrc/cuda by the launches of csrc/cuda (blocks.h).
// Shared memory is thread_local, which a block's threads have in common. Inline assembly is in csrc/cuda/ptx alone,
// whose files are replaced by those of include/cuda/ptx.
//
// What this proves: indices, masks, layouts, who waits for whom. What it cannot: the memory model, races between
// threads (they never run at once), speed.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "blocks.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

static const emulated::ThreadIndex threadIdx;
static const emulated::Index3OfThread<false> blockIdx;
static const emulated::Index3OfThread<true> gridDim;

// What host code launches runs at once, to its end.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
    }
  }
  emulated::launch(
      config->gridDim, static_cast<int>(config->blockDim.x), config->dynamicSmemBytes, [&] { kernel(args...); },
      cluster);
  return cudaSuccess;
}
// kernel<<<grid, threads, shared, stream>>>(args), as test_simulator.py writes it for a compiler that knows no CUDA.
template <typename... Params, typename... Args>
void launch_of(void (*kernel)(Params...), const dim3& grid, int threads, std::size_t shared_bytes, cudaStream_t,
               const Args&... args) {
  emulated::launch(grid, threads, shared_bytes, [&] { kernel(args...); });
}
// Weak: one of a program's files brings them.
extern "C" __attribute__((weak)) cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
extern "C" __attribute__((weak)) cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline void __syncthreads() { emulated::Block::current_block->synchronize(false); }
inline int __syncthreads_count(bool value) { return emulated::Block::current_block->synchronize(value); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFU) { emulated::Block::current_block->exchange(mask, 0); }

inline int lane_of_thread() { return emulated::Block::thread % emulated::kWarp; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulated::shuffle(mask, value, from % emulated::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulated::shuffle(mask, value, lane_of_thread() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return emulated::shuffle(mask, value, lane_of_thread() < by ? lane_of_thread() : lane_of_thread() - by);
}
template <typename T, typename F>
T emulated_reduce(unsigned mask, T value, const F& f) {
  const T* all = emulated::Block::current_block->exchange(mask, value);
  bool first = true;
  T result{};
  for (int lane = 0; lane < emulated::kWarp; ++lane) {
    if (mask >> lane & 1U) {
      result = first ? all[lane] : f(result, all[lane]);
      first = false;
    }
  }
  return result;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulated_reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulated_reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulated_reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulated_reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  const bool* all = emulated::Block::current_block->exchange(mask, value);
  unsigned bits = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) {
    bits |= (mask >> lane & 1U) != 0 && all[lane] ? 1U << lane : 0U;
  }
  return bits;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, sizeof x);
  return x;
}
inline double __hiloint2double(int high, int low) {
  const std::uint64_t bits = std::uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low);
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline double __ull2double_rn(std::uint64_t x) { return static_cast<double>(x); }
inline std::uint64_t __double2ull_ru(double x) { return x <= 0.0 ? 0 : static_cast<std::uint64_t>(std::ceil(x)); }

template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline void __threadfence() {}
template <typename T, typename U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at += static_cast<T>(value);
  return before;
}

template <typename T, typename U>
T atomicMax(T* at, U value) {
  const T before = *at;
  *at = std::max(*at, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicMin(T* at, U value) {
  const T before = *at;
  *at = std::min(*at, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicOr(T* at, U value) {
  const T before = *at;
  *at |= static_cast<T>(value);
  return before;
}

using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }
inline unsigned max(unsigned a, int b) { return std::max(a, static_cast<unsigned>(b)); }
inline unsigned min(int a, unsigned b) { return std::min(static_cast<unsigned>(a), b); }
inline unsigned max(int a, unsigned b) { return std::max(static_cast<unsigned>(a), b); }
