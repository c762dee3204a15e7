// One thread a token: the selection is sorted, so a binary search in the first `count` places.
#include <algorithm>

#include "common/math.h"
#include "cuda/sparse_attn/params.h"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) seen_tokens_kernel(SeenTokensParams params) {
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= params.tokens) {
    return;
  }
  for (std::int64_t b = blockIdx.y; b < params.batch; b += gridDim.y) {
    const std::int32_t* index = params.index + b * params.index_stride[0];
    const int tokens = static_cast<int>(params.tokens);
    int begin = 0, end = min(max(params.count[b * params.count_stride], 0), tokens);
    while (begin < end) {
      const int middle = begin + (end - begin) / 2;
      if (index[middle * params.index_stride[1]] <= token) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    params.seen[b * params.tokens + token] = begin;
  }
}

}  // namespace

cudaError_t launch_seen_tokens(const SeenTokensParams& params, cudaStream_t stream) {
  constexpr std::int64_t kMaxGridY = 65535;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.tokens, std::int64_t{kThreads})),
                  static_cast<unsigned>(std::min(params.batch, kMaxGridY)));
  seen_tokens_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace zipvl::cuda
