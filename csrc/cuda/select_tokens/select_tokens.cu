// Token selection by one block a row, and by groups of blocks that meet in device memory.
#include "cuda/select_tokens/select_tokens.h"

#include "cuda/common/launch.h"
#include "cuda/ptx/sync.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select {
namespace {

struct BlockTeam {
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }

  __device__ BinPair merge(int /*level*/, Bins& bins) const {
    __syncthreads();
    const int pair = pair_of_thread();
    return has_pair() ? BinPair{bins.take(2 * pair), bins.take(2 * pair + 1)} : BinPair{0, 0};
  }

  template <typename T, typename Use>
  __device__ void gather(int /*slot*/, const T& mine, int n, const Use& use) const {
    if (n > 0) {
      use(mine);
    }
  }
};

// A row's workspace, zero before the launch: its blocks' meeting point, sums and records.
struct GridTeam {
  int rank_, size_;
  unsigned* arrived;
  unsigned long long* sums;  // [levels, kBins]
  uint4* records;            // [gathers, size]
  unsigned meetings = 0;

  __device__ GridTeam(const SelectTokensParams& params, std::int64_t b, int rank)
      : rank_(rank), size_(params.blocks_per_row) {
    unsigned char* row = static_cast<unsigned char*>(params.workspace) + b * params.row_workspace_bytes;
    arrived = reinterpret_cast<unsigned*>(row);
    sums = reinterpret_cast<unsigned long long*>(row + plan::kSelectMeetingBytes);
    records = reinterpret_cast<uint4*>(row + plan::kSelectMeetingBytes + plan::kSelectLevels * kBins * 8);
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

  __device__ BinPair merge(int level, Bins& bins) {
    __syncthreads();
    unsigned long long* level_sums = sums + level * kBins;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      const std::int64_t sum = bins.take(bin);
      if (sum != 0) {
        atomicAdd(level_sums + bin, static_cast<unsigned long long>(sum));
      }
    }
    meet();
    if (!has_pair()) {
      return {0, 0};
    }
    const auto both = __ldcg(reinterpret_cast<const longlong2*>(level_sums) + pair_of_thread());
    return {both.x, both.y};
  }

  template <typename T, typename Use>
  __device__ void gather(int slot, const T& mine, int n, const Use& use) {
    static_assert(sizeof(T) == sizeof(uint4));
    uint4* slots = records + slot * size_;
    if (threadIdx.x == 0) {
      memcpy(slots + rank_, &mine, sizeof(T));
    }
    meet();
#pragma unroll 16
    for (int i = 0; i < n; ++i) {
      const uint4 bytes = __ldcg(slots + i);
      T record;
      memcpy(&record, &bytes, sizeof(T));
      use(record);
    }
  }
};

extern __shared__ uint4 dynamic_shared[];

__global__ void __launch_bounds__(kThreads, 1) by_block(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  BlockTeam team;
  select_row(team, blockIdx.x, params, shared, &shared + 1);
}

__global__ void __launch_bounds__(kThreads, 1) by_grid(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int group = static_cast<int>(blockIdx.x) / params.blocks_per_row;
  const int rank = static_cast<int>(blockIdx.x) % params.blocks_per_row;
  for (std::int64_t b = group; b < params.batch; b += params.row_groups) {
    GridTeam team(params, b, rank);
    select_row(team, b, params, shared, &shared + 1);
    __syncthreads();  // the next row reuses shared memory
  }
}

}  // namespace
}  // namespace select

cudaError_t launch_select_tokens(const SelectTokensParams& params, cudaStream_t stream) {
  const auto kernel = params.blocks_per_row > 1 ? &select::by_grid : &select::by_block;
  const std::size_t shared = sizeof(select::Shared) + std::size_t{8} * params.tokens_per_block;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (allowed != cudaSuccess) {
    return allowed;
  }
  if (params.blocks_per_row == 1) {
    return launch_dependent(kernel, static_cast<unsigned>(params.batch), select::kThreads,
                            static_cast<unsigned>(shared), stream, params);
  }
  SelectTokensParams copy = params;
  void* arguments[] = {&copy};
  const cudaError_t cleared = cudaMemsetAsync(params.workspace, 0, params.batch * params.row_workspace_bytes, stream);
  if (cleared != cudaSuccess) {
    return cleared;
  }
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(static_cast<unsigned>(params.row_groups * params.blocks_per_row)),
                                     dim3(select::kThreads), arguments, shared, stream);
}

}  // namespace zipvl::cuda
