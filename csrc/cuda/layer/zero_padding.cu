// A warp a token: it reads the token's mask and stores where that is false.
#include "cuda/layer/zero_padding.h"

#include "common/math.h"
#include "cuda/common/warp.cuh"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokensPerBlock = kThreads / kWarpThreads;
constexpr std::int64_t kVectorBytes = sizeof(uint4);

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

cudaError_t launch_zero_padding(const ZeroPaddingParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(params.tokens, kTokensPerBlock)),
                  static_cast<unsigned>(params.batch));
  zero_padding_kernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace zipvl::cuda
