// Token selection by one block a row, and by groups of blocks that meet in device memory.
#include "cuda/select_tokens/select_tokens.h"

#include "cuda/common/launch.h"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/select_tokens/block_team.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select {
namespace {

// A row's workspace. Zero before the launch: the meeting point and the first histogram.
struct Meeting {
  unsigned arrived;
  int listed[2];
};
static_assert(sizeof(Meeting) <= plan::kSelectMeetingBytes);

template <int kCopies>
struct GridTeam {
  int rank_, size_;
  Meeting* meeting;
  unsigned char* merged;  // three histograms in turn: kBins 8-byte words of budget bins, kBins words of rank bins
  std::uint32_t* lists;   // [2, kMaxListed]
  uint4* records;         // [gathers, size]
  unsigned meetings = 0;
  int merges = 0, listings = 0;

  __device__ GridTeam(const SelectTokensParams& params, std::int64_t b, int rank)
      : rank_(rank), size_(params.blocks_per_row) {
    unsigned char* row = static_cast<unsigned char*>(params.workspace) + b * params.row_workspace_bytes;
    meeting = reinterpret_cast<Meeting*>(row);
    merged = row + plan::kSelectMeetingBytes;
    row = merged + plan::kSelectMerged * plan::kSelectMergedBytes;
    lists = reinterpret_cast<std::uint32_t*>(row);
    records = reinterpret_cast<uint4*>(row + 2 * plan::kSelectListBytes);
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // Every block of the row is here, and sees what the others wrote.
  __device__ void meet() {
    ++meetings;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&meeting->arrived, 1U);
      while (*static_cast<volatile unsigned*>(&meeting->arrived) < meetings * size_) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  // A budget bin's 64 bits: its count, 21 bits, above the sum of its keys' low bits.
  template <bool kMass, bool kRank>
  __device__ Four merge(MassBins* mass, Shared& shared) {
    constexpr int kLowBits = 40;
    __syncthreads();
    Four four = take_bins<kMass, kRank, kCopies>(mass, shared);
    const auto histogram = [&](int i) { return merged + i % plan::kSelectMerged * plan::kSelectMergedBytes; };
    auto* mass_sums = reinterpret_cast<unsigned long long*>(histogram(merges));
    auto* rank_sums = reinterpret_cast<unsigned*>(mass_sums + kBins);
    const int first = group_of_thread() * kBinsEach;
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      if (kMass && four.count[i] != 0) {
        atomicAdd(mass_sums + first + i, (std::uint64_t{four.count[i]} << kLowBits) + four.low[i]);
      }
      if (kRank && four.rank[i] != 0) {
        atomicAdd(rank_sums + first + i, four.rank[i]);
      }
    }
    // The next one was last read two meetings ago.
    auto* next = reinterpret_cast<uint4*>(histogram(merges + 1));
    for (int i = rank_ * kThreads + threadIdx.x; i < plan::kSelectMergedBytes / 16; i += size_ * kThreads) {
      next[i] = uint4{0, 0, 0, 0};
    }
    ++merges;
    meet();
    if constexpr (kMass) {
#pragma unroll
      for (int i = 0; i < kBinsEach; i += 2) {
        const ulonglong2 two = __ldcg(reinterpret_cast<const ulonglong2*>(mass_sums + first + i));
        four.count[i] = static_cast<std::uint32_t>(two.x >> kLowBits);
        four.low[i] = two.x & ((std::uint64_t{1} << kLowBits) - 1);
        four.count[i + 1] = static_cast<std::uint32_t>(two.y >> kLowBits);
        four.low[i + 1] = two.y & ((std::uint64_t{1} << kLowBits) - 1);
      }
    }
    if constexpr (kRank) {
      const uint4 r = __ldcg(reinterpret_cast<const uint4*>(rank_sums + first));
      four.rank[0] = r.x, four.rank[1] = r.y, four.rank[2] = r.z, four.rank[3] = r.w;
    }
    return four;
  }

  __device__ void gather_list(Shared& shared, int all) {
    std::uint32_t* list = lists + listings * kMaxListed;
    int* listed = &meeting->listed[listings++];
    __syncthreads();
    const int mine = shared.listed;
    if (threadIdx.x == 0) {
      shared.paired = atomicAdd(listed, mine);  // lent: nobody pairs yet
    }
    __syncthreads();
    const int start = shared.paired;
    for (int i = threadIdx.x; i < mine; i += kThreads) {
      list[start + i] = shared.list[i];
    }
    meet();
    for (int i = threadIdx.x; i < all; i += kThreads) {
      shared.list[i] = __ldcg(list + i);
    }
    if (threadIdx.x == 0) {
      shared.paired = 0;
    }
    __syncthreads();
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

template <int kItems>
__global__ void __launch_bounds__(kThreads, 1) by_block(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  BlockTeam<kItems / 8> team;
  select_row<kItems>(team, GivenScores(params, blockIdx.x), blockIdx.x, params,
                     reinterpret_cast<MassBins*>(&shared + 1), shared);
}

template <int kItems>
__global__ void __launch_bounds__(kThreads, 1) by_grid(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int group = static_cast<int>(blockIdx.x) / params.blocks_per_row;
  const int rank = static_cast<int>(blockIdx.x) % params.blocks_per_row;
  for (std::int64_t b = group; b < params.batch; b += params.row_groups) {
    GridTeam<kItems / 8> team(params, b, rank);
    select_row<kItems>(team, GivenScores(params, b), b, params, reinterpret_cast<MassBins*>(&shared + 1), shared);
    __syncthreads();  // the next row reuses shared memory
  }
}

template <int kItems>
cudaError_t launch(const SelectTokensParams& params, cudaStream_t stream) {
  const auto kernel = params.blocks_per_row > 1 ? &by_grid<kItems> : &by_block<kItems>;
  constexpr std::size_t kSharedBytes = sizeof(Shared) + kItems / 8 * sizeof(MassBins);
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  if (allowed != cudaSuccess) {
    return allowed;
  }
  if (params.blocks_per_row == 1) {
    return launch_dependent(kernel, static_cast<unsigned>(params.batch), kThreads, kSharedBytes, stream, params);
  }
  SelectTokensParams copy = params;
  void* arguments[] = {&copy};
  const cudaError_t cleared =
      cudaMemset2DAsync(params.workspace, params.row_workspace_bytes, 0,
                        plan::kSelectMeetingBytes + plan::kSelectMergedBytes, params.batch, stream);
  if (cleared != cudaSuccess) {
    return cleared;
  }
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(static_cast<unsigned>(params.row_groups * params.blocks_per_row)),
                                     dim3(kThreads), arguments, kSharedBytes, stream);
}

}  // namespace
}  // namespace select

cudaError_t launch_select_tokens(const SelectTokensParams& params, cudaStream_t stream) {
  switch (params.tokens_per_block / select::kThreads) {
    case 8:
      return select::launch<8>(params, stream);
    case 16:
      return select::launch<16>(params, stream);
    case 32:
      return select::launch<32>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace zipvl::cuda
