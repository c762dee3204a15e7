// Token selection by a cluster of blocks a row. They exchange in each other's shared memory: copies and stores into
// another block complete on that block's mbarriers, so that nothing is fenced and nobody waits for more than the data.
#include "cuda/common/launch.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select_tokens {
namespace {

constexpr int kMaxBlocks = plan::kSelectMaxClusterBlocks;

// mass: buckets of the budget as kLowBits says.
struct alignas(16) Histogram {
  std::uint64_t mass[kBuckets];
  std::uint32_t rank[kBuckets];
};

struct ClusterShared {
  Shared block;
  Histogram block_histogram;  // of this block's keys, the buckets that others add up
  Histogram parts;            // of every block, the buckets that this one adds up: [size, kBuckets / size]
  Histogram row_histogram;    // of the row
  std::uint32_t candidates[2][kMaxBlocks][kMaxCandidates];
  uint4 num_candidates[2][kMaxBlocks];
  uint4 records[plan::kSelectGathers][kMaxBlocks];
  std::uint64_t parts_full, row_histogram_full, candidates_full[2], records_full[plan::kSelectGathers];  // mbarriers
};

template <int kCopies>
struct ClusterGroup {
  ClusterShared& shared;
  int rank_, size_, reductions = 0, candidate_gathers = 0;
  bool begun = false;

  __device__ explicit ClusterGroup(ClusterShared& of_block)
      : shared(of_block), rank_(static_cast<int>(ptx::cluster_rank())), size_(static_cast<int>(ptx::cluster_size())) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&shared.parts_full, 1);
      ptx::mbarrier_init(&shared.row_histogram_full, 1);
      for (int i = 0; i < 2; ++i) {
        ptx::mbarrier_init(&shared.candidates_full[i], 1);
      }
      for (int i = 0; i < plan::kSelectGathers; ++i) {
        ptx::mbarrier_init(&shared.records_full[i], 1);
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

  // Every block adds up its share of the buckets, and copies the sums to all.
  template <bool kMass, bool kRank>
  __device__ ThreadBuckets all_reduce(MassHistogram* mass, Shared& block) {
    constexpr int kBucketBytes = (kMass ? 8 : 0) + (kRank ? 4 : 0);
    const int share = kBuckets / size_, lane = static_cast<int>(threadIdx.x);
    const std::uint32_t parity = reductions++ % 2;
    __syncthreads();
    ThreadBuckets buckets = take_buckets<kMass, kRank, kCopies>(mass, block);
    const int first = bucket_quad() * kBucketsPerThread;
    // The own share's place in `parts` is where it is in `block_histogram`.
    Histogram& here = first / share == rank_ ? shared.parts : shared.block_histogram;
    if constexpr (kMass) {
#pragma unroll
      for (int i = 0; i < kBucketsPerThread; i += 2) {
        *reinterpret_cast<ulonglong2*>(here.mass + first + i) = {
            (std::uint64_t{buckets.count[i]} << kLowBits) + buckets.low[i],
            (std::uint64_t{buckets.count[i + 1]} << kLowBits) + buckets.low[i + 1]};
      }
    }
    if constexpr (kRank) {
      *reinterpret_cast<uint4*>(here.rank + first) = {buckets.rank[0], buckets.rank[1], buckets.rank[2],
                                                      buckets.rank[3]};
    }
    ptx::fence_view_async_shared();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.parts_full, kBucketBytes * (kBuckets - share));
      ptx::mbarrier_arrive_expect_tx(&shared.row_histogram_full, kBucketBytes * (kBuckets - share));
    }
    begin();
    if (lane < size_ && lane != rank_) {
      if constexpr (kMass) {
        copy_part(shared.block_histogram.mass + lane * share, shared.parts.mass + rank_ * share, share * 8, lane,
                  &shared.parts_full);
      }
      if constexpr (kRank) {
        copy_part(shared.block_histogram.rank + lane * share, shared.parts.rank + rank_ * share, share * 4, lane,
                  &shared.parts_full);
      }
    }
    ptx::mbarrier_wait(&shared.parts_full, parity);
    const int sums = (kMass ? share : 0) + (kRank ? share : 0);
    for (int i = threadIdx.x; i < sums; i += kThreads) {
      if (kMass && i < share) {
        std::uint64_t sum = 0;
#pragma unroll 8
        for (int from = 0; from < size_; ++from) {
          sum += shared.parts.mass[from * share + i];
        }
        shared.row_histogram.mass[rank_ * share + i] = sum;
      } else {
        const int bucket = kMass ? i - share : i;
        std::uint32_t sum = 0;
#pragma unroll 8
        for (int from = 0; from < size_; ++from) {
          sum += shared.parts.rank[from * share + bucket];
        }
        shared.row_histogram.rank[rank_ * share + bucket] = sum;
      }
    }
    ptx::fence_view_async_shared();
    __syncthreads();
    if (lane < size_ && lane != rank_) {
      if constexpr (kMass) {
        copy_part(shared.row_histogram.mass + rank_ * share, shared.row_histogram.mass + rank_ * share, share * 8, lane,
                  &shared.row_histogram_full);
      }
      if constexpr (kRank) {
        copy_part(shared.row_histogram.rank + rank_ * share, shared.row_histogram.rank + rank_ * share, share * 4, lane,
                  &shared.row_histogram_full);
      }
    }
    ptx::mbarrier_wait(&shared.row_histogram_full, parity);
    if constexpr (kMass) {
#pragma unroll
      for (int i = 0; i < kBucketsPerThread; ++i) {
        const std::uint64_t sum = shared.row_histogram.mass[first + i];
        buckets.count[i] = static_cast<std::uint32_t>(sum >> kLowBits);
        buckets.low[i] = sum & ((std::uint64_t{1} << kLowBits) - 1);
      }
    }
    if constexpr (kRank) {
      const uint4 r = *reinterpret_cast<const uint4*>(shared.row_histogram.rank + first);
      buckets.rank[0] = r.x, buckets.rank[1] = r.y, buckets.rank[2] = r.z, buckets.rank[3] = r.w;
    }
    return buckets;
  }

  // Each block's list has its place in every block; then they are put together.
  __device__ void all_gather_candidates(Shared& block, int all) {
    const int which = candidate_gathers++;
    auto& lists = shared.candidates[which];
    __syncthreads();
    const int mine = block.num_candidates, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.candidates_full[which], 16 * size_ + 4 * all);
    }
    for (int i = threadIdx.x; i < size_ * mine; i += kThreads) {
      const int to = i % size_;
      ptx::store_async(ptx::shared_address_in(&lists[rank_][i / size_], to), block.candidates[i / size_],
                       ptx::shared_address_in(&shared.candidates_full[which], to));
    }
    if (static_cast<int>(threadIdx.x) < size_) {
      const int to = static_cast<int>(threadIdx.x);
      ptx::store_async(ptx::shared_address_in(&shared.num_candidates[which][rank_], to),
                       uint4{static_cast<std::uint32_t>(mine), 0, 0, 0},
                       ptx::shared_address_in(&shared.candidates_full[which], to));
    }
    ptx::mbarrier_wait(&shared.candidates_full[which], 0);
    __syncthreads();  // every thread has sent its part of the block's own list
    if (warp < size_) {
      int start = 0;
      for (int from = 0; from < warp; ++from) {
        start += static_cast<int>(shared.num_candidates[which][from].x);
      }
      const int theirs = static_cast<int>(shared.num_candidates[which][warp].x);
      for (int i = threadIdx.x % kWarpThreads; i < theirs; i += kWarpThreads) {
        block.candidates[start + i] = lists[warp][i];
      }
    }
    __syncthreads();
  }

  template <typename T, typename Use>
  __device__ void all_gather(int slot, const T& mine, int n, const Use& use) {
    static_assert(sizeof(T) == sizeof(uint4));
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&shared.records_full[slot], size_ * static_cast<int>(sizeof(T)));
    }
    if (static_cast<int>(threadIdx.x) < size_) {
      uint4 record;
      memcpy(&record, &mine, sizeof(T));
      const int to = static_cast<int>(threadIdx.x);
      ptx::store_async(ptx::shared_address_in(&shared.records[slot][rank_], to), record,
                       ptx::shared_address_in(&shared.records_full[slot], to));
    }
    ptx::mbarrier_wait(&shared.records_full[slot], 0);
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
  ClusterGroup<kItems / 8> group(shared);
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  const std::int64_t b = blockIdx.x / group.size();
  select_row<kItems>(group, GivenScores(params, b), b, params, reinterpret_cast<MassHistogram*>(&shared + 1),
                     shared.block);
}

template <int kItems>
cudaError_t launch_cluster(const SelectTokensParams& params, cudaStream_t stream) {
  constexpr std::size_t kSharedBytes = sizeof(ClusterShared) + kItems / 8 * sizeof(MassHistogram);
  return launch_dependent_clusters(&by_cluster<kItems>, static_cast<unsigned>(params.blocks_per_row),
                                   static_cast<unsigned>(params.batch * params.blocks_per_row), kThreads, kSharedBytes,
                                   stream, params);
}

}  // namespace
}  // namespace select_tokens

cudaError_t launch_select_tokens_cluster(const SelectTokensParams& params, cudaStream_t stream) {
  switch (params.tokens_per_block / select_tokens::kThreads) {
    case 8:
      return select_tokens::launch_cluster<8>(params, stream);
    case 16:
      return select_tokens::launch_cluster<16>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace zipvl::cuda
