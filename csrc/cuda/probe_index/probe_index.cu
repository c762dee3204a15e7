// The probe tokens of each row (ZipVL Sec. A), one block a row. Without a mask a token's rank is its position, so each
// thread writes its own slots. With one, two passes over the mask: the first counts the real tokens, the second numbers
// them and writes those whose rank is a probe's.
#include "common/probe_draw.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/probe_index/params.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 1024;  // the most: with a mask a block walks its row between barriers
constexpr int kWarps = kThreads / kWarpThreads;

// How many of the block's `flag`s are set before this thread, and in all. Every thread of the block calls it.
struct BlockCount {
  int before, total;
};

__device__ BlockCount count_flags(bool flag, int* warp_totals /* shared [kWarps] */) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const unsigned ballot = __ballot_sync(kAllLanes, flag);
  if (lane == 0) {
    warp_totals[warp] = __popc(ballot);
  }
  __syncthreads();
  BlockCount count{__popc(ballot & ((1U << lane) - 1U)), 0};
  for (int w = 0; w < kWarps; ++w) {
    count.before += w < warp ? warp_totals[w] : 0;
    count.total += warp_totals[w];
  }
  __syncthreads();  // warp_totals may be written again
  return count;
}

// The slot of a real token of rank `rank`, or -1 where it is no probe.
__device__ std::int64_t slot_of(std::int64_t rank, const ProbeSplit& split, const ProbeIndexParams& params) {
  if (rank >= split.earlier) {
    return split.random + (rank - split.earlier);
  }
  if (split.random == 0) {
    return -1;
  }
  // The stratum that covers the rank: the last i with floor(i * earlier / random) <= rank.
  const std::int64_t slot = ((rank + 1) * split.random - 1) / split.earlier;
  return probe_rank(split, params.seed, params.num_random, slot) == rank ? slot : -1;
}

__global__ void __launch_bounds__(kThreads) probe_index_kernel(ProbeIndexParams params) {
  __shared__ int warp_totals[kWarps];
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  const std::int64_t b = blockIdx.x, probes = params.num_recent + params.num_random;
  std::int32_t* out = params.out + b * probes;
  const bool* mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.mask_stride[0];

  std::int64_t real = params.tokens - params.first, earlier = params.first;  // real tokens from `first` on, before it
  if (mask != nullptr) {
    real = earlier = 0;
    for (std::int64_t first = 0; first < params.tokens; first += kThreads) {
      const std::int64_t n = first + threadIdx.x;
      const bool is_real = n < params.tokens && mask[n * params.mask_stride[1]];
      real += __syncthreads_count(is_real && n >= params.first);
      if (first < params.first) {
        earlier += __syncthreads_count(is_real && n < params.first);
      }
    }
  }
  const ProbeDraw draw = draw_probes(real, params.num_recent, params.num_random, params.seed);
  const ProbeSplit& split = draw.split;
  const std::int64_t count = split.random + split.recent;
  for (std::int64_t slot = threadIdx.x; slot < probes; slot += kThreads) {
    if (mask == nullptr || slot >= count) {
      const std::int64_t rank = draw.rank(slot);
      out[slot] = static_cast<std::int32_t>(rank < 0 ? rank : rank + params.first);
    }
  }
  if (mask == nullptr) {
    return;
  }
  const std::int64_t all = earlier + real,
                     kept_rank = max(all - params.keep_recent, std::int64_t{0});  // the first kept
  if (params.keep_from != nullptr && threadIdx.x == 0 && kept_rank >= all) {
    params.keep_from[b] = static_cast<std::int32_t>(params.tokens);
  }
  std::int64_t numbered = 0;
  for (std::int64_t first = 0; first < params.tokens; first += kThreads) {
    const std::int64_t n = first + threadIdx.x;
    const bool is_real = n < params.tokens && mask[n * params.mask_stride[1]];
    const BlockCount found = count_flags(is_real, warp_totals);
    if (is_real) {
      const std::int64_t rank = numbered + found.before;
      if (params.keep_from != nullptr && rank == kept_rank) {
        params.keep_from[b] = static_cast<std::int32_t>(n);
      }
      const std::int64_t slot = rank < earlier ? -1 : slot_of(rank - earlier, split, params);
      if (slot >= 0) {
        out[slot] = static_cast<std::int32_t>(n);
      }
    }
    numbered += found.total;
  }
}

}  // namespace

cudaError_t launch_probe_index(const ProbeIndexParams& params, cudaStream_t stream) {
  return launch_dependent(&probe_index_kernel, static_cast<unsigned>(params.batch), kThreads, 0, stream, params);
}

}  // namespace zipvl::cuda
