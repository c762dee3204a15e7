// Token selection by one block a row, straight from the sums of probe_scores' one kernel for both passes: the scores
// are made as they are read. That kernel lets this one start when all before it is done, so that how many probes see a
// token is counted while it runs.
#include "cuda/common/launch.h"
#include "cuda/probe_scores/probes.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/select_tokens/select_row.cuh"

namespace zipvl::cuda {
namespace select_tokens {
namespace {

constexpr int kItems = plan::kSelectTokensPerCopy / kThreads;

// Every thread makes the scores of quads of tokens, one of each `kThreads` in a row, so that short rows keep every warp
// busy; then it takes those of its own tokens.
struct SummedScores {
  static constexpr bool kSigned = false;  // sums of exponentials
  static constexpr int kQuads = kItems / 4;

  const ProbeScoresParams& from;
  std::int64_t b;
  int viewers[kQuads][4];

  static __device__ int first_token(int quad) { return 4 * (static_cast<int>(threadIdx.x) + quad * kThreads); }

  __device__ SummedScores(const ProbeScoresParams& of, std::int64_t row) : from(of), b(row), viewers{} {
    const int lane = threadIdx.x % kWarpThreads;
    for (int begin = 0; begin < from.probes; begin += 32) {
      const int probe = begin + lane;
      const int limit =
          probe < from.probes ? probe_scores::limit_of(from, b, probe_scores::new_probe_position(from, b, probe)) : -1;
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const int n = first_token(quad), first = n - 4 * lane, last = min(first + 128, from.tokens) - 1;  // of the warp
        const int of_all = __popc(__ballot_sync(kAllLanes, limit >= last));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          viewers[quad][c] += of_all;
        }
        for (unsigned some = __ballot_sync(kAllLanes, limit >= first && limit < last); some != 0; some &= some - 1) {
          const int near = __shfl_sync(kAllLanes, limit, __ffs(static_cast<int>(some)) - 1);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            viewers[quad][c] += near >= n + c ? 1 : 0;
          }
        }
      }
    }
  }

  __device__ void load(Keys<kItems>& keys, int /*first*/, int tokens) const {
    alignas(16) __shared__ float accumulated[plan::kSelectTokensPerCopy];
    alignas(16) __shared__ float normalized[plan::kSelectTokensPerCopy];
    const int parts = from.kv_heads * from.row_splits;
    const float* sums = from.sums + b * parts * tokens;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const int n = first_token(quad);
      if (n < tokens) {
        const float4 sum = sums_of_quad(sums + n, parts, tokens, min(tokens - n, 4));
        const probe_scores::TokenScores scores[] = {probe_scores::scores_of(sum.x, viewers[quad][0], from.query_heads),
                                                    probe_scores::scores_of(sum.y, viewers[quad][1], from.query_heads),
                                                    probe_scores::scores_of(sum.z, viewers[quad][2], from.query_heads),
                                                    probe_scores::scores_of(sum.w, viewers[quad][3], from.query_heads)};
        *reinterpret_cast<float4*>(accumulated + n) = {scores[0].accumulated, scores[1].accumulated,
                                                       scores[2].accumulated, scores[3].accumulated};
        *reinterpret_cast<float4*>(normalized + n) = {scores[0].normalized, scores[1].normalized, scores[2].normalized,
                                                      scores[3].normalized};
      }
    }
    __syncthreads();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const int n = Keys<kItems>::place(quad);
      load_scores(keys.budget + 4 * quad, accumulated, 1, /*vectors=*/true, n, tokens);
      load_scores(keys.rank + 4 * quad, normalized, 1, /*vectors=*/true, n, tokens);
    }
  }

  // The first `there` tokens of a quad; 0 for the others.
  static __device__ float4 sums_of_quad(const float* first, int parts, int tokens, int there) {
    return tokens % 4 == 0 ? probe_scores::sum_of_parts(reinterpret_cast<const float4*>(first), parts, tokens / 4)
                           : sums_apart(first, parts, tokens, there);
  }

  // Where a part's quads are not aligned. Apart, so that its code stays out of the usual way.
  static __device__ __noinline__ float4 sums_apart(const float* first, int parts, int tokens, int there) {
    float sum[4] = {};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll 1
      for (int part = 0; part < parts && c < there; ++part) {
        probe_scores::add_part(sum[c], first[static_cast<std::int64_t>(part) * tokens + c]);
      }
    }
    return {sum[0], sum[1], sum[2], sum[3]};
  }
};

extern __shared__ uint4 dynamic_shared[];

__global__ void __launch_bounds__(kThreads, 1) by_block_of_sums(const __grid_constant__ SelectTokensParams params,
                                                                const __grid_constant__ ProbeScoresParams from) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  ptx::launch_dependent_grids();
  const SummedScores scores(from, blockIdx.x);
  ptx::wait_on_dependent_grids();
  BlockGroup<kItems / 8> group;
  select_row<kItems>(group, scores, blockIdx.x, params, reinterpret_cast<MassHistogram*>(&shared + 1), shared);
}

}  // namespace
}  // namespace select_tokens

cudaError_t launch_select_sums(const SelectTokensParams& params, const ProbeScoresParams& from, cudaStream_t stream) {
  constexpr std::size_t kSharedBytes =
      sizeof(select_tokens::Shared) + select_tokens::kItems / 8 * sizeof(select_tokens::MassHistogram);
  return launch_dependent(&select_tokens::by_block_of_sums, static_cast<unsigned>(params.batch),
                          select_tokens::kThreads, kSharedBytes, stream, params, from);
}

}  // namespace zipvl::cuda
