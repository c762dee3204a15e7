// The launches for one head dim and element: the attention kernel, then the combining one.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/decode_attn/sm80/combine.cuh"
#include "cuda/decode_attn/sm80/kernel.cuh"
#include "cuda/decode_attn/sm80/quantized_kernel.cuh"

namespace zipvl::cuda::decode_attn::sm80 {

// `kernel`, then the combining one; the start of each overlaps the end of what is before it. Both prefer the same
// carveout of shared memory, as changing that between kernels stalls.
template <typename Params>
cudaError_t launch_pair(void (*kernel)(Params), void (*of_few)(Params), void (*of_many)(Params), const Params& params,
                        const DecodeAttnParams& attn, cudaStream_t stream) {
  LaunchOptions options{.grid = dim3(static_cast<unsigned>(attn.blocks)),
                        .threads = static_cast<unsigned>(attn.warps * kWarpThreads),
                        .shared_bytes = static_cast<unsigned>(attn.shared_bytes),
                        .dependent = true,
                        .max_carveout = true};
  if (const cudaError_t error = launch_kernel(kernel, options, stream, params); error != cudaSuccess) {
    return error;
  }
  const std::int64_t heads = attn.batch * attn.query_heads;
  const bool many = heads > kManyHeads;
  options.grid = dim3(static_cast<unsigned>(heads));
  options.threads = many ? kCombineThreadsManyHeads : kCombineThreads;
  options.shared_bytes = 0;
  return launch_kernel(many ? of_many : of_few, options, stream, params);
}

template <typename ElementType, int D, int Warps>
cudaError_t launch_with_warps(const DecodeAttnParams& params, cudaStream_t stream) {
  return launch_pair(decode_attn_kernel<ElementType, D, Warps, stages(D)>,
                     combine_kernel<ElementType, D, Warps, kCombineThreads>,
                     combine_kernel<ElementType, D, Warps, kCombineThreadsManyHeads>, params, params, stream);
}

template <typename ElementType, int D>
cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream) {
  constexpr int kMaxWarps = max_warps(D);
  return params.warps == kMaxWarps ? launch_with_warps<ElementType, D, kMaxWarps>(params, stream)
                                   : launch_with_warps<ElementType, D, kMaxWarps / 2>(params, stream);
}

template <typename ElementType, int D>
cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream) {
  constexpr int kMaxWarps = quantized_warps(D), kMinWarps = kMinQuantizedWarps;
  DecodeAttnQuantizedParams with_bits = params;
  with_bits.code_bits = CodeElement<ElementType>::kBits;
  return launch_pair(params.attn.warps == kMaxWarps ? decode_attn_quantized_kernel<ElementType, D, kMaxWarps>
                                                    : decode_attn_quantized_kernel<ElementType, D, kMinWarps>,
                     combine_quantized_kernel<ElementType, D, kCombineThreads>,
                     combine_quantized_kernel<ElementType, D, kCombineThreadsManyHeads>, with_bits, params.attn,
                     stream);
}

}  // namespace zipvl::cuda::decode_attn::sm80
