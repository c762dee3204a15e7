// Token selection by a cluster of blocks a row. They meet in each other's shared memory: copies and stores into another
// block complete on that block's mbarriers, so that nothing is fenced and nobody waits for more than the data.
#include "cuda/common/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select {
namespace {

constexpr int kMaxBlocks = plan::kSelectMaxClusterBlocks;

// A budget bin's 64 bits: its count, 21 bits, above the sum of its keys' low bits.
struct alignas(16) Histogram {
  std::uint64_t mass[kBins];
  std::uint32_t rank[kBins];
};

struct ClusterShared {
  Shared block;
  Histogram mine;    // of this block's keys, the bins that others add up
  Histogram parts;   // of every block, the bins that this one adds up: [size, kBins / size]
  Histogram merged;  // of the row
  std::uint32_t lists[2][kMaxBlocks][kMaxListed];
  uint4 listed[2][kMaxBlocks];
  uint4 records[plan::kSelectGathers][kMaxBlocks];
  std::uint64_t parts_here, merged_here, lists_here[2], records_here[plan::kSelectGathers];  // mbarriers
};

template <int kCopies>
struct ClusterTeam {
  static constexpr int kLowBits = 40;

  ClusterShared& shared;
  int rank_, size_, merges = 0, listings = 0;
  bool begun = false;

  __device__ explicit ClusterTeam(ClusterShared& of_block)
      : shared(of_block), rank_(static_cast<int>(ptx::cluster_rank())), size_(static_cast<int>(ptx::cluster_size())) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&shared.parts_here, 1);
      ptx::mbarrier_init(&shared.merged_here, 1);
      for (int i = 0; i < 2; ++i) {
        ptx::mbarrier_init(&shared.lists_here[i], 1);
      }
      for (int i = 0; i < plan::kSelectGathers; ++i) {
        ptx::mbarrier_init(&shared.records_here[i], 1);
      }
      ptx::fence_barrier_init();
    }
    ptx::cluster_arrive();  // waited for before the first store into another block
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // Copies `bytes` to `target`'s place in block `to`, another one: memcheck takes a bulk copy to the own block for an
  // error.
  __device__ void copy_part(const void* source, const void* target, int bytes, int to, std::uint64_t* barrier) const {
    ptx::bulk_copy_to_block(ptx::shared_address_in(target, to), source, bytes, ptx::shared_address_in(barrier, to));
  }

  // Every block adds up its share of the bins, and copies the sums to all.
  template <bool kMass, bool kRank>
  __device__ Four merge(MassBins* mass, Shared& block) {
    constexpr int kBinBytes = (kMass ? 8 : 0) + (kRank ? 4 : 0);
    const int share = kBins / size_, lane = static_cast<int>(threadIdx.x);
    const std::uint32_t parity = merges++ % 2;
    __syncthreads();
    Four four = take_bins<kMass, kRank, kCopies>(mass, block);
    const int first = group_of_thread() * kBinsEach;
    // The own share's place in `parts` is where it is in `mine`.
    Histogram& here = first / share == rank_ ? shared.parts : shared.mine;
    if constexpr (kMass) {
#pragma unroll
      for (int i = 0; i < kBinsEach; i += 2) {
        *reinterpret_cast<ulonglong2*>(here.mass + first + i) = {
            (std::uint64_t{four.count[i]} << kLowBits) + four.low[i],
            (std::uint64_t{four.count[i + 1]} << kLowBits) + four.low[i + 1]};
      }
    }
    if constexpr (kRank) {
      *reinterpret_cast<uint4*>(here.rank + first) = {four.rank[0], four.rank[1], four.rank[2], four.rank[3]};
    }
    ptx::fence_view_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.parts_here, kBinBytes * (kBins - share));
      ptx::mbarrier_arrive_expect_tx(&shared.merged_here, kBinBytes * (kBins - share));
    }
    begin();
    if (lane < size_ && lane != rank_) {
      if constexpr (kMass) {
        copy_part(shared.mine.mass + lane * share, shared.parts.mass + rank_ * share, share * 8, lane,
                  &shared.parts_here);
      }
      if constexpr (kRank) {
        copy_part(shared.mine.rank + lane * share, shared.parts.rank + rank_ * share, share * 4, lane,
                  &shared.parts_here);
      }
    }
    ptx::mbarrier_wait(&shared.parts_here, parity);
    const int sums = (kMass ? share : 0) + (kRank ? share : 0);
    for (int i = threadIdx.x; i < sums; i += kThreads) {
      if (kMass && i < share) {
        std::uint64_t sum = 0;
#pragma unroll 8
        for (int from = 0; from < size_; ++from) {
          sum += shared.parts.mass[from * share + i];
        }
        shared.merged.mass[rank_ * share + i] = sum;
      } else {
        const int bin = kMass ? i - share : i;
        std::uint32_t sum = 0;
#pragma unroll 8
        for (int from = 0; from < size_; ++from) {
          sum += shared.parts.rank[from * share + bin];
        }
        shared.merged.rank[rank_ * share + bin] = sum;
      }
    }
    ptx::fence_view_async_shared();
    __syncthreads();
    if (lane < size_ && lane != rank_) {
      if constexpr (kMass) {
        copy_part(shared.merged.mass + rank_ * share, shared.merged.mass + rank_ * share, share * 8, lane,
                  &shared.merged_here);
      }
      if constexpr (kRank) {
        copy_part(shared.merged.rank + rank_ * share, shared.merged.rank + rank_ * share, share * 4, lane,
                  &shared.merged_here);
      }
    }
    ptx::mbarrier_wait(&shared.merged_here, parity);
    if constexpr (kMass) {
#pragma unroll
      for (int i = 0; i < kBinsEach; ++i) {
        const std::uint64_t sum = shared.merged.mass[first + i];
        four.count[i] = static_cast<std::uint32_t>(sum >> kLowBits);
        four.low[i] = sum & ((std::uint64_t{1} << kLowBits) - 1);
      }
    }
    if constexpr (kRank) {
      const uint4 r = *reinterpret_cast<const uint4*>(shared.merged.rank + first);
      four.rank[0] = r.x, four.rank[1] = r.y, four.rank[2] = r.z, four.rank[3] = r.w;
    }
    return four;
  }

  // Each block's list has its place in every block; then they are put together.
  __device__ void gather_list(Shared& block, int all) {
    const int which = listings++;
    auto& lists = shared.lists[which];
    __syncthreads();
    const int mine = block.listed, warp = static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.lists_here[which], 16 * size_ + 4 * all);
    }
    for (int i = threadIdx.x; i < size_ * mine; i += kThreads) {
      const int to = i % size_;
      ptx::store_async(ptx::shared_address_in(&lists[rank_][i / size_], to), block.list[i / size_],
                       ptx::shared_address_in(&shared.lists_here[which], to));
    }
    if (static_cast<int>(threadIdx.x) < size_) {
      const int to = static_cast<int>(threadIdx.x);
      ptx::store_async(ptx::shared_address_in(&shared.listed[which][rank_], to),
                       uint4{static_cast<std::uint32_t>(mine), 0, 0, 0},
                       ptx::shared_address_in(&shared.lists_here[which], to));
    }
    ptx::mbarrier_wait(&shared.lists_here[which], 0);
    __syncthreads();  // every thread has sent its part of the block's own list
    if (warp < size_) {
      int start = 0;
      for (int from = 0; from < warp; ++from) {
        start += static_cast<int>(shared.listed[which][from].x);
      }
      const int theirs = static_cast<int>(shared.listed[which][warp].x);
      for (int i = threadIdx.x % 32; i < theirs; i += 32) {
        block.list[start + i] = lists[warp][i];
      }
    }
    __syncthreads();
  }

  template <typename T, typename Use>
  __device__ void gather(int slot, const T& mine, int n, const Use& use) {
    static_assert(sizeof(T) == sizeof(uint4));
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.records_here[slot], size_ * static_cast<int>(sizeof(T)));
    }
    if (static_cast<int>(threadIdx.x) < size_) {
      uint4 record;
      memcpy(&record, &mine, sizeof(T));
      const int to = static_cast<int>(threadIdx.x);
      ptx::store_async(ptx::shared_address_in(&shared.records[slot][rank_], to), record,
                       ptx::shared_address_in(&shared.records_here[slot], to));
    }
    ptx::mbarrier_wait(&shared.records_here[slot], 0);
    for (int from = 0; from < n; ++from) {
      T record;
      memcpy(&record, &shared.records[slot][from], sizeof(T));
      use(record);
    }
  }

 private:
  __device__ void begin() {
    if (!begun) {
      ptx::cluster_wait();
      begun = true;
    }
  }
};

extern __shared__ uint4 dynamic_shared[];

template <int kItems>
__global__ void __launch_bounds__(kThreads, 1) by_cluster(const __grid_constant__ SelectTokensParams params) {
  ClusterShared& shared = *reinterpret_cast<ClusterShared*>(dynamic_shared);
  ClusterTeam<kItems / 8> team(shared);
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  const std::int64_t b = blockIdx.x / team.size();
  select_row<kItems>(team, GivenScores(params, b), b, params, reinterpret_cast<MassBins*>(&shared + 1), shared.block);
}

template <int kItems>
cudaError_t launch_cluster(const SelectTokensParams& params, cudaStream_t stream) {
  constexpr std::size_t kSharedBytes = sizeof(ClusterShared) + kItems / 8 * sizeof(MassBins);
  const cudaError_t error = cudaFuncSetAttribute(by_cluster<kItems>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(kSharedBytes));
  if (error != cudaSuccess) {
    return error;
  }
  return launch_dependent_clusters(&by_cluster<kItems>, static_cast<unsigned>(params.blocks_per_row),
                                   static_cast<unsigned>(params.batch * params.blocks_per_row), kThreads, kSharedBytes,
                                   stream, params);
}

}  // namespace
}  // namespace select

cudaError_t launch_select_tokens_cluster(const SelectTokensParams& params, cudaStream_t stream) {
  switch (params.tokens_per_block / select::kThreads) {
    case 8:
      return select::launch_cluster<8>(params, stream);
    case 16:
      return select::launch_cluster<16>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace zipvl::cuda
