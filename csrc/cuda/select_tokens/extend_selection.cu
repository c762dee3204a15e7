// A neighbourhood's additions to a selection, and the list of real tokens. One block a batch row walks the tokens once
// (twice where some are padding, to know how many are real), four or sixteen tokens a thread, and numbers them by block
// scans.
#include "cuda/select_tokens/extend_selection.h"

#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpThreads;

struct WarpTotals {
  int of_warp[kWarps];
};

struct BlockSum {
  int before, total;
};

// The sum of `mine` over the threads before this one, and over all.
__device__ BlockSum block_sum(int mine, WarpTotals& totals) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  int inclusive = mine;
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    inclusive += lane >= step ? other : 0;
  }
  if (lane == kWarpThreads - 1) {
    totals.of_warp[warp] = inclusive;
  }
  __syncthreads();
  const int total_of_lane = totals.of_warp[lane];
  const int before = __reduce_add_sync(kAllLanes, lane < warp ? total_of_lane : 0);
  const int total = __reduce_add_sync(kAllLanes, total_of_lane);
  __syncthreads();
  return {before + inclusive - mine, total};
}
static_assert(kWarps == kWarpThreads, "a lane a warp");

__device__ bool is_set(const bool* row, std::int64_t stride, int n, int tokens) {
  return n < tokens && row[n * stride];
}

// Each: adjacent tokens of a thread.
template <int Each>
__global__ void __launch_bounds__(kThreads)
    extend_selection_kernel(const __grid_constant__ ExtendSelectionParams params) {
  constexpr int kChunk = kThreads * Each;
  __shared__ WarpTotals totals;
  __shared__ alignas(16) unsigned char selected[kChunk];
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  const std::int64_t b = blockIdx.x;
  const int tokens = params.tokens, thread = static_cast<int>(threadIdx.x);
  const bool* mask = params.token_mask == nullptr ? nullptr : params.token_mask + b * params.token_stride[0];
  const bool* extra = params.extra_mask == nullptr ? nullptr : params.extra_mask + b * params.extra_stride[0];
  const std::int32_t* index = params.index == nullptr ? nullptr : params.index + b * tokens;
  std::int32_t* extended = params.extended_index == nullptr ? nullptr : params.extended_index + b * tokens;
  std::int32_t* real_index = params.real_index == nullptr ? nullptr : params.real_index + b * tokens;
  const int count = index == nullptr ? 0 : min(max(params.count[b], 0), tokens);

  int all_real = tokens;
  if (mask != nullptr) {
    int mine = 0;
    for (int n = thread; n < tokens; n += kThreads) {
      mine += mask[n * params.token_stride[1]] ? 1 : 0;
    }
    all_real = block_sum(mine, totals).total;
  }
  const int window_from = all_real - params.local_window;  // rank of the first of the last real tokens
  int place = 0, numbered = 0, taken = 0;                  // entries of index, real tokens, tokens taken so far
  for (int first = 0; first < tokens; first += kChunk) {
#pragma unroll
    for (int i = 0; i < Each; i += 4) {
      *reinterpret_cast<std::uint32_t*>(selected + thread * Each + i) = 0;
    }
    __syncthreads();
    int passed = 0;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      const int at = place + i * kThreads + thread;
      const int token = at < count ? index[at] : tokens;
      if (token < min(first + kChunk, tokens)) {
        ++passed;
        if (token >= first) {
          selected[token - first] = 1;
        }
      }
    }
    place += block_sum(passed, totals).total;
    const int own = first + thread * Each;
    bool real[Each];
    int real_here = 0;
#pragma unroll
    for (int i = 0; i < Each; ++i) {
      real[i] = mask == nullptr ? own + i < tokens : is_set(mask, params.token_stride[1], own + i, tokens);
      real_here += real[i] ? 1 : 0;
    }
    int rank = own;
    if (mask != nullptr) {
      const BlockSum sum = block_sum(real_here, totals);
      rank = numbered + sum.before;
      numbered += sum.total;
    }
    bool takes[Each];
    int takes_here = 0;
#pragma unroll
    for (int i = 0, at = rank; i < Each; ++i) {
      takes[i] = selected[thread * Each + i] != 0;
      if (real[i]) {
        takes[i] = takes[i] || at < params.num_sinks || at >= window_from ||
                   (extra != nullptr && is_set(extra, params.extra_stride[1], own + i, tokens));
        if (real_index != nullptr) {
          real_index[at] = own + i;
        }
        ++at;
      }
      takes_here += takes[i] ? 1 : 0;
    }
    if (extended != nullptr) {
      const BlockSum sum = block_sum(takes_here, totals);
      int at = taken + sum.before;
      taken += sum.total;
#pragma unroll
      for (int i = 0; i < Each; ++i) {
        if (takes[i]) {
          extended[at++] = own + i;
        }
      }
    }
    __syncthreads();  // `selected` is written again
  }
  if (extended != nullptr) {
    for (int at = taken + thread; at < tokens; at += kThreads) {
      extended[at] = tokens;
    }
  }
  if (real_index != nullptr) {
    for (int at = all_real + thread; at < tokens; at += kThreads) {
      real_index[at] = tokens;
    }
  }
  if (thread == 0) {
    if (extended != nullptr) {
      params.extended_count[b] = taken;
    }
    if (real_index != nullptr) {
      params.real_count[b] = all_real;
    }
  }
}

}  // namespace

cudaError_t launch_extend_selection(const ExtendSelectionParams& params, cudaStream_t stream) {
  // A walk of long rows costs the scans of its rounds, one of short rows a thread's tokens.
  constexpr int kShort = 4, kLong = 16;
  auto* kernel =
      params.tokens <= kThreads * kShort ? &extend_selection_kernel<kShort> : &extend_selection_kernel<kLong>;
  return launch_dependent(kernel, static_cast<unsigned>(params.batch), kThreads, 0, stream, params);
}

}  // namespace zipvl::cuda
