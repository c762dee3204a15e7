// Token selection by a cluster of blocks a row, which meet in each other's shared memory.
#include <cooperative_groups.h>

#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select {
namespace {

constexpr int kMostBlocks = 16;

struct ClusterShared {
  Shared block;
  std::int64_t sums[kBins];
  alignas(16) unsigned char records[plan::kSelectGathers][kMostBlocks][kRecordBytes];
};

struct ClusterTeam {
  cooperative_groups::cluster_group cluster;
  ClusterShared& shared;
  int rank_, size_;

  __device__ explicit ClusterTeam(ClusterShared& of_block)
      : cluster(cooperative_groups::this_cluster()),
        shared(of_block),
        rank_(static_cast<int>(cluster.block_rank())),
        size_(static_cast<int>(cluster.num_blocks())) {
    cluster.barrier_arrive();  // waited for where another block's memory is first touched
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // Each block adds up a slice of the bins and hands the sums to all.
  __device__ void merge(int /*level*/, const Bins& mine) {
    cluster.sync();
    const int slice = kBins / size_;
    for (int i = threadIdx.x; i < slice; i += kThreads) {
      const int bin = rank_ * slice + i;
      std::int64_t sum = 0;
#pragma unroll 8
      for (int r = 0; r < size_; ++r) {
        sum += cluster.map_shared_rank(&mine, r)->sum(bin);
      }
#pragma unroll 8
      for (int r = 0; r < size_; ++r) {
        cluster.map_shared_rank(&shared, r)->sums[bin] = sum;
      }
    }
    cluster.sync();
  }

  __device__ std::int64_t sum(int /*level*/, int bin) const { return shared.sums[bin]; }

  template <typename T>
  __device__ T sum_records(int slot, const T& mine, int n) {
    if (slot == 0) {
      cluster.barrier_wait();
    }
    if (static_cast<int>(threadIdx.x) < size_) {
      *reinterpret_cast<T*>(cluster.map_shared_rank(&shared, threadIdx.x)->records[slot][rank_]) = mine;
    }
    cluster.sync();
    return sum_of<T>(n, [&](int i) { return *reinterpret_cast<const T*>(shared.records[slot][i]); });
  }
};

extern __shared__ unsigned char dynamic_shared[];

__global__ void __launch_bounds__(kThreads, 1) by_cluster(const __grid_constant__ SelectTokensParams params) {
  ClusterShared& shared = *reinterpret_cast<ClusterShared*>(dynamic_shared);
  ClusterTeam team(shared);
  select_row(team, blockIdx.x / team.size(), params, shared.block, dynamic_shared + sizeof(ClusterShared));
}

}  // namespace
}  // namespace select

cudaError_t launch_select_tokens_cluster(const SelectTokensParams& params, cudaStream_t stream) {
  const std::size_t shared = sizeof(select::ClusterShared) + std::size_t{8} * params.tokens_per_block;
  cudaError_t error =
      cudaFuncSetAttribute(select::by_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && params.blocks_per_row > 8) {
    error = cudaFuncSetAttribute(select::by_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(params.blocks_per_row), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.batch * params.blocks_per_row));
  config.blockDim = dim3(select::kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, select::by_cluster, params);
}

}  // namespace zipvl::cuda
