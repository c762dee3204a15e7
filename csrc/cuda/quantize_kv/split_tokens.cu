// The real tokens that the selection leaves out, in ascending order. A block of threads marks which tokens of its chunk
// are selected (the selection is ascending, so its entries of the chunk lie together); the first kernel counts the
// others, the second one writes them behind those of the chunks before.
#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "common/quantized_block.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/quantize_kv/params.h"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerThread = kSplitChunk / kThreads;
constexpr int kWarps = kThreads / kWarpThreads;

__device__ int clamped_count(const QuantizeKvParams& params, std::int64_t b) {
  return static_cast<int>(
      min(max(static_cast<std::int64_t>(params.count[b * params.count_stride]), std::int64_t{0}), params.tokens));
}

// Bit i: token first + i of the calling thread is real and not selected, where `first` is the thread's first token.
__device__ unsigned rest_of_thread(const QuantizeKvParams& params, std::int64_t b, int chunk, bool* selected) {
  const int begin = chunk * kSplitChunk;
  const int end = static_cast<int>(min(params.tokens, static_cast<std::int64_t>(begin) + kSplitChunk));
  for (int i = static_cast<int>(threadIdx.x); i < kSplitChunk; i += kThreads) {
    selected[i] = false;
  }
  const std::int32_t* index = params.index + b * params.index_stride[0];
  const int count = clamped_count(params, b);
  int low = 0, high = count;  // the first entry at or after `begin` lies in [low, high]
  while (low < high) {
    const int middle = (low + high) / 2;
    if (index[middle * params.index_stride[1]] < begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  __syncthreads();
  for (int place = low + static_cast<int>(threadIdx.x); place < count && place < low + kSplitChunk; place += kThreads) {
    const int position = index[place * params.index_stride[1]];
    if (position >= begin && position < end) {
      selected[position - begin] = true;
    }
  }
  __syncthreads();
  unsigned rest = 0;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int local = static_cast<int>(threadIdx.x) * kTokensPerThread + i;
    const std::int64_t token = begin + local;
    if (token < end && !selected[local] &&
        (params.token_mask == nullptr ||
         params.token_mask[b * params.mask_stride[0] + token * params.mask_stride[1]])) {
      rest |= 1U << i;
    }
  }
  return rest;
}

// Sum over the block of threads; every thread gets it. `shared` [kWarps].
__device__ int block_sum(int x, int* shared) {
  const int in_warp = __reduce_add_sync(kAllLanes, x);
  if (threadIdx.x % kWarpThreads == 0) {
    shared[threadIdx.x / kWarpThreads] = in_warp;
  }
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    sum += shared[w];
  }
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ QuantizeKvParams params) {
  __shared__ bool selected[kSplitChunk];
  __shared__ int sums[kWarps];
  const int chunk = static_cast<int>(blockIdx.x);
  for (std::int64_t b = blockIdx.y; b < params.batch; b += gridDim.y) {
    const int sum = block_sum(__popc(rest_of_thread(params, b, chunk, selected)), sums);
    if (threadIdx.x == 0) {
      params.chunk_rest[b * params.chunks + chunk] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads) emit_kernel(const __grid_constant__ QuantizeKvParams params) {
  __shared__ bool selected[kSplitChunk];
  __shared__ int sums[kWarps];
  const int chunk = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  for (std::int64_t b = blockIdx.y; b < params.batch; b += gridDim.y) {
    const unsigned rest = rest_of_thread(params, b, chunk, selected);
    int before = 0;
    for (int c = thread; c < chunk; c += kThreads) {
      before += params.chunk_rest[b * params.chunks + c];
    }
    before = block_sum(before, sums);
    // Of the threads before this one in the chunk: in the warp by a scan, of the warps before by their sums.
    const int own = __popc(rest);
    int through = own;
    for (int offset = 1; offset < kWarpThreads; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, through, offset);
      through += thread % kWarpThreads >= offset ? other : 0;
    }
    if (thread % kWarpThreads == kWarpThreads - 1) {
      sums[thread / kWarpThreads] = through;
    }
    __syncthreads();
    int place = before + through - own, total = before;
    for (int w = 0; w < kWarps; ++w) {
      place += w < thread / kWarpThreads ? sums[w] : 0;
      total += sums[w];
    }
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      if ((rest >> i & 1U) != 0) {
        params.rest[b * params.tokens + place++] = chunk * kSplitChunk + thread * kTokensPerThread + i;
      }
    }
    if (chunk == params.chunks - 1 && thread == 0) {
      constexpr int kBlock = quantized::kBlockTokens;
      params.rest_count[b] = total;
      params.blocks[0][b] = ceil_div(clamped_count(params, b), kBlock);
      params.blocks[1][b] = ceil_div(total, kBlock);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_split_tokens(const QuantizeKvParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.chunks), static_cast<unsigned>(std::min(params.batch, kMaxGridYZ)));
  count_kernel<<<grid, kThreads, 0, stream>>>(params);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return error;
  }
  emit_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace zipvl::cuda
