// Two steps around attention of every query: before, how many selected tokens each token sees; after, zeros in the
// rows of padding.
#include <algorithm>

#include "common/math.h"
#include "cuda/common/warp.cuh"
#include "cuda/sparse_attn/params.h"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 256;

// One thread a token: the selection is sorted, so a binary search in the first `count` places.
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

constexpr int kTokensPerBlock = kThreads / kWarpThreads;
constexpr std::int64_t kVectorBytes = sizeof(uint4);

// A warp a token: it reads the token's mask and stores where that is false.
__global__ void __launch_bounds__(kThreads) zero_padding_kernel(const __grid_constant__ ZeroPaddingParams params) {
  const std::int64_t b = blockIdx.y;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarpThreads;
  if (token >= params.tokens || params.token_mask[b * params.mask_stride[0] + token * params.mask_stride[1]]) {
    return;
  }
  unsigned char* row = static_cast<unsigned char*>(params.out) + (b * params.tokens + token) * params.row_bytes;
  for (std::int64_t byte = threadIdx.x % kWarpThreads * kVectorBytes; byte < params.row_bytes;
       byte += kWarpThreads * kVectorBytes) {
    *reinterpret_cast<uint4*>(row + byte) = make_uint4(0, 0, 0, 0);
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

cudaError_t launch_zero_padding(const ZeroPaddingParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(params.tokens, kTokensPerBlock)),
                  static_cast<unsigned>(params.batch));
  zero_padding_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace zipvl::cuda
