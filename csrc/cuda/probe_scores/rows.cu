// The small kernels around the two passes: gather the probes' rows, combine the first pass's partial sums, and turn the
// second's into scores. Each sum has one order, so the same bits come out on every run.
#include <algorithm>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/probe_scores/passes.h"
#include "cuda/probe_scores/probes.cuh"
#include "cuda/probe_scores/statistics.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::probe_scores {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kMaxProbes = static_cast<int>(plan::kProbeMaxProbes);
static_assert(kThreads >= kMaxProbes, "a thread each");
constexpr int kWordsPerWarp = 8;  // of the packed mask
constexpr int kWordsPerBlock = kWarps * kWordsPerWarp;
constexpr int kCombineGroups = 8;  // threads that share a row's partial sums
constexpr int kCombineRows = kThreads / kCombineGroups;

struct GatherRoles {
  int gather_blocks, limit_blocks, mask_blocks_each;
};

__device__ void gather_pieces(const ProbeScoresParams& params, int block, int blocks) {
  const int pieces = params.head_dim / kPieceElements;
  const std::int64_t total = static_cast<std::int64_t>(params.batch) * params.kv_heads * params.rows * pieces;
  const int group = params.query_heads / params.kv_heads;
  const auto* q = static_cast<const std::uint16_t*>(params.q);
  const bool aligned = has_aligned_pieces(params);
  for (std::int64_t i = static_cast<std::int64_t>(block) * kThreads + threadIdx.x; i < total;
       i += static_cast<std::int64_t>(blocks) * kThreads) {
    const auto piece = static_cast<int>(i % pieces);
    const std::int64_t row_of_all = i / pieces;
    const auto row = static_cast<int>(row_of_all % params.rows);
    const auto head_of_all = static_cast<int>(row_of_all / params.rows);
    const int b = head_of_all / params.kv_heads, kv_head = head_of_all % params.kv_heads;
    const int position = probe_position(params, b, row / group);
    uint4 value = make_uint4(0, 0, 0, 0);
    if (is_token(params, position)) {
      const std::uint16_t* source = q + b * params.q_stride[0] + (kv_head * group + row % group) * params.q_stride[1] +
                                    (position - params.first_query) * params.q_stride[2] + piece * kPieceElements;
      value = load_piece(params, source, aligned);
    }
    static_cast<uint4*>(params.probe_rows)[i] = value;
  }
}

__device__ void write_limits(const ProbeScoresParams& params, int b) {
  __shared__ std::int32_t limits[kMaxProbes];
  if (static_cast<int>(threadIdx.x) < params.probes) {
    limits[threadIdx.x] = limit_of(params, b, probe_position(params, b, threadIdx.x));
  }
  __syncthreads();
  const int group = params.query_heads / params.kv_heads;
  const auto limit_of_row = [&](int row) { return row < params.rows ? limits[row / group] : -1; };
  for (int row = threadIdx.x; row < params.rows_padded; row += kThreads) {
    params.row_limit[static_cast<std::int64_t>(b) * params.rows_padded + row] = limit_of_row(row);
  }
  const int units = params.rows_padded / kUnitRows;
  for (int unit = threadIdx.x / kWarpThreads; unit < units; unit += kWarps) {
    const int lane = threadIdx.x % kWarpThreads;
    const int first = limit_of_row(unit * kUnitRows + lane),
              second = limit_of_row(unit * kUnitRows + kWarpThreads + lane);
    const int min_limit = __reduce_min_sync(kAllLanes, min(first, second));
    const int max_limit = __reduce_max_sync(kAllLanes, max(first, second));
    if (lane == 0) {
      reinterpret_cast<int2*>(params.unit_range)[static_cast<std::int64_t>(b) * units + unit] =
          make_int2(min_limit, max_limit);
    }
  }
}

__device__ void pack_mask(const ProbeScoresParams& params, int b, int block) {
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const bool* mask = params.token_mask + b * params.mask_stride[0];
#pragma unroll
  for (int i = 0; i < kWordsPerWarp; ++i) {
    const int word = block * kWordsPerBlock + i * kWarps + warp;
    const int token = word * 32 + lane;
    const unsigned bits = __ballot_sync(kAllLanes, token < params.tokens && mask[token * params.mask_stride[1]]);
    if (lane == 0 && word < params.words) {
      params.mask_words[static_cast<std::int64_t>(b) * params.words + word] = bits;
    }
  }
}

__global__ void __launch_bounds__(kThreads) gather_rows_kernel(ProbeScoresParams params, GatherRoles roles) {
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  int block = static_cast<int>(blockIdx.x);
  if (block < roles.limit_blocks) {
    write_limits(params, block);
    return;
  }
  block -= roles.limit_blocks;
  if (block < roles.gather_blocks) {
    gather_pieces(params, block, roles.gather_blocks);
    return;
  }
  block -= roles.gather_blocks;
  pack_mask(params, block / roles.mask_blocks_each, block % roles.mask_blocks_each);
}

// Whether any of the keys up to `limit` is real.
__device__ bool sees_some_key(const ProbeScoresParams& params, int b, int limit) {
  if (params.mask_words == nullptr) {
    return true;
  }
  const std::uint32_t* words = params.mask_words + static_cast<std::int64_t>(b) * params.words;
  std::uint32_t seen = 0;
  for (int word = 0; word <= limit / 32; ++word) {
    const bool last = word == limit / 32;
    seen |= words[word] & (last ? 0xFFFFFFFFU >> (31 - limit % 32) : 0xFFFFFFFFU);
    if (seen != 0) {
      return true;
    }
  }
  return false;
}

struct MaxSum {
  float max, sum;
};

// Sums relative to the greater maximum. NaN in a sum stays.
__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b, float scale_log2) {
  const float max = fmaxf(a.max, b.max);
  const float base = scaled_max(max, scale_log2);
  const float share_a = a.max == -INFINITY ? a.sum : a.sum * ptx::exp2(fmaf(a.max, scale_log2, -base));
  const float share_b = b.max == -INFINITY ? b.sum : b.sum * ptx::exp2(fmaf(b.max, scale_log2, -base));
  return {max, share_a + share_b};
}

// A block takes 32 rows of one key/value head, eight threads a row; then the eight in a fixed order.
__global__ void __launch_bounds__(kThreads) combine_rows_kernel(ProbeScoresParams params) {
  __shared__ float2 part[kCombineGroups][kCombineRows];
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  const int blocks_each = params.rows_padded / kCombineRows;
  const std::int64_t head = blockIdx.x / blocks_each;  // of all batch rows
  const int row_in_block = threadIdx.x % kCombineRows, split_group = threadIdx.x / kCombineRows;
  const int row = static_cast<int>(blockIdx.x) % blocks_each * kCombineRows + row_in_block;
  const auto* partial =
      reinterpret_cast<const float2*>(params.partial) + head * params.splits * params.rows_padded + row;
  MaxSum stats{-INFINITY, 0.0F};
#pragma unroll 4
  for (int split = split_group; split < params.splits; split += kCombineGroups) {
    const float2 one = partial[static_cast<std::int64_t>(split) * params.rows_padded];
    stats = merge(stats, {one.x, one.y}, params.scale_log2);
  }
  part[split_group][row_in_block] = make_float2(stats.max, stats.sum);
  __syncthreads();
  if (split_group != 0) {
    return;
  }
#pragma unroll
  for (int other = 1; other < kCombineGroups; ++other) {
    stats = merge(stats, {part[other][row_in_block].x, part[other][row_in_block].y}, params.scale_log2);
  }
  const auto b = static_cast<int>(head / params.kv_heads);
  const int limit = params.row_limit[static_cast<std::int64_t>(b) * params.rows_padded + row];
  const bool sees = stats.sum == 0.0F && limit >= 0 && sees_some_key(params, b, limit);
  params.row_lse[head * params.rows_padded + row] =
      log_sum_exp(scaled_max(stats.max, params.scale_log2), stats.sum, sees);
}

// A block takes 256 tokens of one batch row, a thread each. kProbesAreThere: the kernel before lets this one start when
// all before it is done, so that the probes that see a token are counted while it runs.
template <bool kProbesAreThere>
__global__ void __launch_bounds__(kThreads) finish_scores_kernel(ProbeScoresParams params, int blocks_each) {
  __shared__ std::int32_t near_limit[kMaxProbes];
  __shared__ int near_count;
  ptx::launch_dependent_grids();
  const int b = static_cast<int>(blockIdx.x) / blocks_each;
  const int first = static_cast<int>(blockIdx.x) % blocks_each * kThreads;
  const int token = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x == 0) {
    near_count = 0;
  }
  __syncthreads();
  if (!kProbesAreThere) {
    ptx::wait_on_dependent_grids();
  }
  const bool valid = token < params.tokens;
  const int limit = static_cast<int>(threadIdx.x) < params.probes
                        ? limit_of(params, b, new_probe_position(params, b, threadIdx.x))
                        : -1;
  // Probes whose limit is past the block see all of it; those whose limit lies in it are few, and compared one by one.
  const auto count_viewers = [&] {
    if (limit >= first && limit < first + kThreads - 1) {
      near_limit[atomicAdd(&near_count, 1)] = limit;
    }
    int viewers = __syncthreads_count(limit >= first + kThreads - 1);
    for (int i = 0; i < near_count; ++i) {
      viewers += near_limit[i] >= token ? 1 : 0;
    }
    return viewers;
  };
  int viewers = 0;
  if (kProbesAreThere) {
    viewers = count_viewers();
    ptx::wait_on_dependent_grids();
  }
  const bool real = valid && (params.token_mask == nullptr ||
                              params.token_mask[b * params.mask_stride[0] + token * params.mask_stride[1]]);
  const int parts = params.kv_heads * params.row_splits;
  const float* sums = params.sums + static_cast<std::int64_t>(b) * parts * params.tokens + token;
  const float sum = valid ? sum_of_parts(sums, parts, params.tokens) : 0.0F;
  if (!kProbesAreThere) {  // after the loads, so that all are under way together
    viewers = count_viewers();
  }
  if (!valid) {
    return;
  }
  if (!real) {
    viewers = 0;
  }
  const TokenScores scores = scores_of(sum, viewers, params.query_heads);
  const std::int64_t at = static_cast<std::int64_t>(b) * params.tokens + token;
  params.accumulated[at] = scores.accumulated;
  params.normalized[at] = scores.normalized;
}

}  // namespace

cudaError_t launch_gather_rows(const ProbeScoresParams& params, cudaStream_t stream) {
  const std::int64_t pieces =
      static_cast<std::int64_t>(params.batch) * params.kv_heads * params.rows * (params.head_dim / kPieceElements);
  constexpr int kMaxBlocks = 1 << 16;
  const GatherRoles roles{
      static_cast<int>(std::min<std::int64_t>(ceil_div<std::int64_t>(pieces, kThreads), kMaxBlocks)), params.batch,
      ceil_div(params.words, kWordsPerBlock)};
  const int mask_blocks = params.mask_words == nullptr ? 0 : params.batch * roles.mask_blocks_each;
  return launch_dependent(&gather_rows_kernel,
                          static_cast<unsigned>(roles.limit_blocks + roles.gather_blocks + mask_blocks), kThreads, 0,
                          stream, params, roles);
}

cudaError_t launch_combine_rows(const ProbeScoresParams& params, cudaStream_t stream) {
  const int blocks = params.batch * params.kv_heads * (params.rows_padded / kCombineRows);
  return launch_dependent(&combine_rows_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, params);
}

cudaError_t launch_finish_scores(const ProbeScoresParams& params, cudaStream_t stream) {
  const int blocks_each = ceil_div(params.tokens, kThreads);
  return launch_dependent(params.cluster_blocks > 0 ? &finish_scores_kernel<true> : &finish_scores_kernel<false>,
                          static_cast<unsigned>(params.batch * blocks_each), kThreads, 0, stream, params, blocks_each);
}

}  // namespace zipvl::cuda::probe_scores
