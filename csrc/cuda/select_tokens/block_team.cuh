// A block that has a row to itself (the Team of select_row).
#pragma once

#include "cuda/select_tokens/bins.cuh"

namespace zipvl::cuda::select {

template <int kCopies>
struct BlockTeam {
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }

  template <bool kMass, bool kRank>
  __device__ Four merge(MassBins* mass, Shared& shared) const {
    __syncthreads();
    return take_bins<kMass, kRank, kCopies>(mass, shared);
  }

  __device__ void gather_list(Shared& /*shared*/, int /*all*/) const { __syncthreads(); }

  template <typename T, typename Use>
  __device__ void gather(int /*slot*/, const T& mine, int n, const Use& use) const {
    if (n > 0) {
      use(mine);
    }
  }
};

}  // namespace zipvl::cuda::select
