// Token selection by a cluster of blocks a row. They meet in each other's shared memory: every block stores its part
// into the inbox of every block, and its stores count towards that block's mbarrier, so that nothing is fenced and
// nobody waits for more than the data.
#include "cuda/common/launch.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select {
namespace {

struct ClusterShared {
  Shared block;
  std::uint64_t arrived[2];  // mbarriers, of the inboxes
};

// Meetings use two inboxes in turn. Two are enough: a block that stores for meeting m + 2 has had every part of m + 1,
// and a block sends its part of m + 1 after it has read its inbox of m.
struct ClusterTeam {
  ClusterShared& shared;
  uint4* inboxes;  // shared [2, size, kPairs]
  int rank_, size_, meeting = 0;

  __device__ ClusterTeam(ClusterShared& of_block, uint4* of_inboxes)
      : shared(of_block),
        inboxes(of_inboxes),
        rank_(static_cast<int>(ptx::cluster_rank())),
        size_(static_cast<int>(ptx::cluster_size())) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(&shared.arrived[0], 1);
      ptx::mbarrier_init(&shared.arrived[1], 1);
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_arrive();  // waited for before the first store into another block
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  __device__ uint4* inbox(int from) const { return inboxes + ((meeting % 2) * size_ + from) * kPairs; }

  // The mbarrier of this meeting in block `to`, and the place of this block's part there.
  __device__ void send(int to, int place, const uint4& part) const {
    ptx::store_async(ptx::shared_address_in(inbox(rank_) + place, to), part,
                     ptx::shared_address_in(&shared.arrived[meeting % 2], to));
  }

  __device__ void expect(int parts) const {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(&shared.arrived[meeting % 2], parts * size_ * static_cast<int>(sizeof(uint4)));
    }
    if (meeting == 0) {
      ptx::cluster_wait();
    }
  }

  __device__ void wait() const { ptx::mbarrier_wait(&shared.arrived[meeting % 2], meeting / 2 % 2); }

  __device__ BinPair merge(int /*level*/, Bins& bins) {
    __syncthreads();
    expect(kPairs);
    BinPair sum{0, 0};
    if (has_pair()) {
      const int pair = pair_of_thread();
      const BinPair mine{bins.take(2 * pair), bins.take(2 * pair + 1)};
      uint4 part;
      memcpy(&part, &mine, sizeof(part));
      for (int to = 0; to < size_; ++to) {
        send(to, static_cast<int>(threadIdx.x), part);
      }
      wait();
#pragma unroll 8
      for (int from = 0; from < size_; ++from) {
        part = inbox(from)[threadIdx.x];
        BinPair other;
        memcpy(&other, &part, sizeof(part));
        sum = {sum.lower + other.lower, sum.upper + other.upper};
      }
    }
    ++meeting;
    return sum;
  }

  template <typename T, typename Use>
  __device__ void gather(int /*slot*/, const T& mine, int n, const Use& use) {
    static_assert(sizeof(T) == sizeof(uint4));
    expect(1);
    if (static_cast<int>(threadIdx.x) < size_) {
      uint4 part;
      memcpy(&part, &mine, sizeof(part));
      send(static_cast<int>(threadIdx.x), 0, part);
    }
    wait();
    for (int from = 0; from < n; ++from) {
      T record;
      memcpy(&record, inbox(from), sizeof(record));
      use(record);
    }
    ++meeting;
    __syncthreads();  // every thread has read its inbox before one sends again
  }
};

extern __shared__ uint4 dynamic_shared[];

__global__ void __launch_bounds__(kThreads, 1) by_cluster(const __grid_constant__ SelectTokensParams params) {
  ClusterShared& shared = *reinterpret_cast<ClusterShared*>(dynamic_shared);
  uint4* inboxes = reinterpret_cast<uint4*>(&shared + 1);
  ClusterTeam team(shared, inboxes);
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  select_row(team, blockIdx.x / team.size(), params, shared.block, inboxes + 2 * team.size() * kPairs);
}

}  // namespace
}  // namespace select

cudaError_t launch_select_tokens_cluster(const SelectTokensParams& params, cudaStream_t stream) {
  const std::size_t shared = sizeof(select::ClusterShared) +
                             sizeof(uint4) * 2 * select::kPairs * params.blocks_per_row +
                             std::size_t{8} * params.tokens_per_block;
  cudaError_t error =
      cudaFuncSetAttribute(select::by_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && params.blocks_per_row > 8) {
    error = cudaFuncSetAttribute(select::by_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) {
    return error;
  }
  return launch_dependent_clusters(&select::by_cluster, static_cast<unsigned>(params.blocks_per_row),
                                   static_cast<unsigned>(params.batch * params.blocks_per_row), select::kThreads,
                                   static_cast<unsigned>(shared), stream, params);
}

}  // namespace zipvl::cuda
