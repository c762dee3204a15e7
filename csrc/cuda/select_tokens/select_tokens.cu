// Token selection by one block a row, and by groups of blocks of a cooperative grid, which exchange in device memory.
#include "cuda/select_tokens/params.h"

#include "cuda/common/launch.h"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select_tokens {
namespace {

// A row's workspace. Zero before the launch: the barrier and the first histogram.
struct GridBarrier {
  unsigned arrived;
  int num_candidates[2];
};
static_assert(sizeof(GridBarrier) <= plan::kSelectBarrierBytes);

template <int kCopies>
struct GridGroup {
  int rank_, size_;
  GridBarrier* barrier;
  unsigned char*
      histograms;  // three histograms in turn: kBuckets 8-byte words of budget buckets, kBuckets words of rank buckets
  std::uint32_t* candidates;  // [2, kMaxCandidates]
  uint4* records;             // [gathers, size]
  unsigned syncs = 0;
  int reductions = 0, candidate_gathers = 0;

  __device__ GridGroup(const SelectTokensParams& params, std::int64_t b, int rank)
      : rank_(rank), size_(params.blocks_per_row) {
    unsigned char* row = static_cast<unsigned char*>(params.workspace) + b * params.row_workspace_bytes;
    barrier = reinterpret_cast<GridBarrier*>(row);
    histograms = row + plan::kSelectBarrierBytes;
    row = histograms + plan::kSelectHistograms * plan::kSelectHistogramBytes;
    candidates = reinterpret_cast<std::uint32_t*>(row);
    records = reinterpret_cast<uint4*>(row + 2 * plan::kSelectCandidatesBytes);
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // Every block of the row is here, and sees what the others wrote.
  __device__ void sync() {
    ++syncs;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&barrier->arrived, 1U);
      while (*static_cast<volatile unsigned*>(&barrier->arrived) < syncs * size_) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  template <bool kMass, bool kRank>
  __device__ ThreadBuckets all_reduce(MassHistogram* mass, Shared& shared) {
    __syncthreads();
    ThreadBuckets buckets = take_buckets<kMass, kRank, kCopies>(mass, shared);
    const auto histogram = [&](int i) {
      return histograms + i % plan::kSelectHistograms * plan::kSelectHistogramBytes;
    };
    auto* mass_sums = reinterpret_cast<unsigned long long*>(histogram(reductions));
    auto* rank_sums = reinterpret_cast<unsigned*>(mass_sums + kBuckets);
    const int first = bucket_quad() * kBucketsPerThread;
#pragma unroll
    for (int i = 0; i < kBucketsPerThread; ++i) {
      if (kMass && buckets.count[i] != 0) {
        atomicAdd(mass_sums + first + i, (std::uint64_t{buckets.count[i]} << kLowBits) + buckets.low[i]);
      }
      if (kRank && buckets.rank[i] != 0) {
        atomicAdd(rank_sums + first + i, buckets.rank[i]);
      }
    }
    // The next one was last read two barriers ago.
    auto* next = reinterpret_cast<uint4*>(histogram(reductions + 1));
    for (int i = rank_ * kThreads + threadIdx.x; i < plan::kSelectHistogramBytes / 16; i += size_ * kThreads) {
      next[i] = uint4{0, 0, 0, 0};
    }
    ++reductions;
    sync();
    if constexpr (kMass) {
#pragma unroll
      for (int i = 0; i < kBucketsPerThread; i += 2) {
        const ulonglong2 two = __ldcg(reinterpret_cast<const ulonglong2*>(mass_sums + first + i));
        buckets.count[i] = static_cast<std::uint32_t>(two.x >> kLowBits);
        buckets.low[i] = two.x & ((std::uint64_t{1} << kLowBits) - 1);
        buckets.count[i + 1] = static_cast<std::uint32_t>(two.y >> kLowBits);
        buckets.low[i + 1] = two.y & ((std::uint64_t{1} << kLowBits) - 1);
      }
    }
    if constexpr (kRank) {
      const uint4 r = __ldcg(reinterpret_cast<const uint4*>(rank_sums + first));
      buckets.rank[0] = r.x, buckets.rank[1] = r.y, buckets.rank[2] = r.z, buckets.rank[3] = r.w;
    }
    return buckets;
  }

  __device__ void all_gather_candidates(Shared& shared, int all) {
    std::uint32_t* list = candidates + candidate_gathers * kMaxCandidates;
    int* num_candidates = &barrier->num_candidates[candidate_gathers++];
    __syncthreads();
    const int mine = shared.num_candidates;
    if (threadIdx.x == 0) {
      shared.num_compared = atomicAdd(num_candidates, mine);  // borrowed: nobody compares yet
    }
    __syncthreads();
    const int start = shared.num_compared;
    for (int i = threadIdx.x; i < mine; i += kThreads) {
      list[start + i] = shared.candidates[i];
    }
    sync();
    for (int i = threadIdx.x; i < all; i += kThreads) {
      shared.candidates[i] = __ldcg(list + i);
    }
    if (threadIdx.x == 0) {
      shared.num_compared = 0;
    }
    __syncthreads();
  }

  template <typename T, typename Use>
  __device__ void all_gather(int slot, const T& mine, int n, const Use& use) {
    static_assert(sizeof(T) == sizeof(uint4));
    uint4* slots = records + slot * size_;
    if (threadIdx.x == 0) {
      memcpy(slots + rank_, &mine, sizeof(T));
    }
    sync();
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
  BlockGroup<kItems / 8> group;
  select_row<kItems>(group, GivenScores(params, blockIdx.x), blockIdx.x, params,
                     reinterpret_cast<MassHistogram*>(&shared + 1), shared);
}

template <int kItems>
__global__ void __launch_bounds__(kThreads, 1) by_grid(const __grid_constant__ SelectTokensParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int row_group = static_cast<int>(blockIdx.x) / params.blocks_per_row;
  const int rank = static_cast<int>(blockIdx.x) % params.blocks_per_row;
  for (std::int64_t b = row_group; b < params.batch; b += params.row_groups) {
    GridGroup<kItems / 8> group(params, b, rank);
    select_row<kItems>(group, GivenScores(params, b), b, params, reinterpret_cast<MassHistogram*>(&shared + 1), shared);
    __syncthreads();  // the next row reuses shared memory
  }
}

template <int kItems>
cudaError_t launch(const SelectTokensParams& params, cudaStream_t stream) {
  const auto kernel = params.blocks_per_row > 1 ? &by_grid<kItems> : &by_block<kItems>;
  constexpr std::size_t kSharedBytes = sizeof(Shared) + kItems / 8 * sizeof(MassHistogram);
  if (params.blocks_per_row == 1) {
    return launch_dependent(kernel, static_cast<unsigned>(params.batch), kThreads, kSharedBytes, stream, params);
  }
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), device, kSharedBytes);
  }
  if (error != cudaSuccess) {
    return error;
  }
  SelectTokensParams copy = params;
  void* arguments[] = {&copy};
  const cudaError_t cleared =
      cudaMemset2DAsync(params.workspace, params.row_workspace_bytes, 0,
                        plan::kSelectBarrierBytes + plan::kSelectHistogramBytes, params.batch, stream);
  if (cleared != cudaSuccess) {
    return cleared;
  }
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(static_cast<unsigned>(params.row_groups * params.blocks_per_row)),
                                     dim3(kThreads), arguments, kSharedBytes, stream);
}

}  // namespace
}  // namespace select_tokens

cudaError_t launch_select_tokens(const SelectTokensParams& params, cudaStream_t stream) {
  switch (params.tokens_per_block / select_tokens::kThreads) {
    case 8:
      return select_tokens::launch<8>(params, stream);
    case 16:
      return select_tokens::launch<16>(params, stream);
    case 32:
      return select_tokens::launch<32>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace zipvl::cuda
