// Token selection by one block a row, and by groups of blocks that meet in global memory.
#include "cuda/select_tokens/select_tokens.h"

#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select {
namespace {

struct BlockTeam {
  const Bins& bins;

  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void merge(int /*level*/, const Bins& /*mine*/) const { __syncthreads(); }
  __device__ std::int64_t sum(int /*level*/, int bin) const { return bins.sum(bin); }
  template <typename T>
  __device__ T sum_records(int /*slot*/, const T& mine, int n) const {
    return n == 0 ? T{} : mine;
  }
};

// A row's workspace, zero before the launch: its blocks' meeting point, sums and records.
struct GridTeam {
  int rank_, size_;
  unsigned* arrived;
  unsigned long long* sums;  // [levels, kBins]
  unsigned char* records;    // [gathers, size, kRecordBytes]
  unsigned meetings = 0;

  __device__ GridTeam(const SelectTokensParams& params, std::int64_t b, int rank)
      : rank_(rank), size_(params.blocks_per_row) {
    unsigned char* row = static_cast<unsigned char*>(params.workspace) + b * params.row_workspace_bytes;
    arrived = reinterpret_cast<unsigned*>(row);
    sums = reinterpret_cast<unsigned long long*>(row + plan::kSelectMeetingBytes);
    records = row + plan::kSelectMeetingBytes + plan::kSelectLevels * kBins * 8;
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // Every block of the row is here, and sees what the others wrote.
  __device__ void meet() {
    ++meetings;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1U);
      while (*static_cast<volatile unsigned*>(arrived) < meetings * size_) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  __device__ void merge(int level, const Bins& mine) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      const std::int64_t sum = mine.sum(bin);
      if (sum != 0) {
        atomicAdd(sums + level * kBins + bin, static_cast<unsigned long long>(sum));
      }
    }
    meet();
  }

  __device__ std::int64_t sum(int level, int bin) const {
    return static_cast<std::int64_t>(__ldcg(sums + level * kBins + bin));
  }

  template <typename T>
  __device__ T sum_records(int slot, const T& mine, int n) {
    unsigned char* slots = records + slot * size_ * kRecordBytes;
    if (threadIdx.x == 0) {
      *reinterpret_cast<T*>(slots + rank_ * kRecordBytes) = mine;
    }
    meet();
    return sum_of<T>(n, [&](int i) {
      T record;
      std::uint32_t words[sizeof(T) / 4];
      const auto* from = reinterpret_cast<const std::uint32_t*>(slots + i * kRecordBytes);
#pragma unroll
      for (std::size_t w = 0; w < sizeof(T) / 4; ++w) {
        words[w] = __ldcg(from + w);
      }
      memcpy(&record, words, sizeof(T));
      return record;
    });
  }
};

extern __shared__ unsigned char dynamic_shared[];

__global__ void __launch_bounds__(kThreads, 1) by_block(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  BlockTeam team{shared.bins};
  select_row(team, blockIdx.x, params, shared, dynamic_shared + sizeof(Shared));
}

__global__ void __launch_bounds__(kThreads, 1) by_grid(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int group = static_cast<int>(blockIdx.x) / params.blocks_per_row;
  const int rank = static_cast<int>(blockIdx.x) % params.blocks_per_row;
  for (std::int64_t b = group; b < params.batch; b += params.row_groups) {
    GridTeam team(params, b, rank);
    select_row(team, b, params, shared, dynamic_shared + sizeof(Shared));
    __syncthreads();  // the next row reuses shared memory
  }
}

}  // namespace
}  // namespace select

cudaError_t launch_select_tokens(const SelectTokensParams& params, cudaStream_t stream) {
  const bool grid = params.blocks_per_row > 1;
  const void* kernel =
      grid ? reinterpret_cast<const void*>(select::by_grid) : reinterpret_cast<const void*>(select::by_block);
  const std::size_t shared = sizeof(select::Shared) + std::size_t{8} * params.tokens_per_block;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (allowed != cudaSuccess) {
    return allowed;
  }
  SelectTokensParams copy = params;
  void* arguments[] = {&copy};
  if (!grid) {
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(params.batch)), dim3(select::kThreads), arguments,
                            shared, stream);
  }
  const cudaError_t cleared = cudaMemsetAsync(params.workspace, 0, params.batch * params.row_workspace_bytes, stream);
  if (cleared != cudaSuccess) {
    return cleared;
  }
  return cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(params.row_groups * params.blocks_per_row)),
                                     dim3(select::kThreads), arguments, shared, stream);
}

}  // namespace zipvl::cuda
