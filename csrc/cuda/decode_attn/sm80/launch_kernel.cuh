// Launch of the kernels for one head dim and dtype.
#pragma once

#include <mutex>

#include "cuda/decode_attn/sm80/combine.cuh"
#include "cuda/decode_attn/sm80/launch.h"
#include "cuda/decode_attn/sm80/quantized_kernel.cuh"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda::decode {

template <typename Element, int D, int MinTiles, int Threads>
__global__ void __launch_bounds__(Threads, 65536 / (Threads * kCombineRegisters))
    combine_kernel(const __grid_constant__ DecodeAttnParams params) {
  ptx::launch_dependent_grids();
  const OutputHead head = output_head(params);
  const PlaceRange range = place_range<MinTiles>(row_tiles(params), params.blocks, head);
  ptx::wait_on_dependent_grids();
  const std::int64_t at = blockIdx.x;
  combine<Element, D, Threads>(range, head, params.partials, static_cast<Element*>(params.out) + at * D,
                               params.lse + at);
}

template <typename Element, int D, int Threads>
__global__ void __launch_bounds__(Threads, 65536 / (Threads * kCombineRegisters))
    combine_quantized_kernel(const __grid_constant__ DecodeAttnQuantizedParams params) {
  const DecodeAttnParams& attn = params.attn;
  ptx::launch_dependent_grids();
  const OutputHead head = output_head(attn);
  const PlaceRange range = place_range<decode_shape::kMinQuantizedWarps>(LineOfTiles(params), attn.blocks, head);
  ptx::wait_on_dependent_grids();
  const std::int64_t at = blockIdx.x;
  combine<Element, D, Threads>(range, head, attn.partials, static_cast<Element*>(attn.out) + at * D, attn.lse + at);
}

// One kernel of the pair. Both prefer shared memory over L1 to the full, as changing that between kernels stalls.
template <typename Params>
cudaError_t launch_one(void (*kernel)(Params), const Params& params, std::int64_t blocks, int threads, int shared,
                       bool dependent, cudaStream_t stream) {
  // The attributes are the kernel's, and another thread of the host may ask for less between here and the launch.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// `kernel`, then the combining one; the start of each overlaps the end of what is before it.
template <typename Params>
cudaError_t launch_pair(void (*kernel)(Params), void (*of_few)(Params), void (*of_many)(Params), const Params& params,
                        const DecodeAttnParams& attn, cudaStream_t stream) {
  if (const cudaError_t error =
          launch_one(kernel, params, attn.blocks, attn.warps * 32, attn.shared_bytes, attn.dependent_launch, stream);
      error != cudaSuccess) {
    return error;
  }
  const std::int64_t heads = attn.batch * attn.query_heads;
  const bool many = heads > kManyHeads;
  return launch_one(many ? of_many : of_few, params, heads, many ? kCombineThreadsOfMany : kCombineThreads, 0,
                    attn.dependent_launch, stream);
}

template <typename Element, int D, int Warps>
cudaError_t launch_with_warps(const DecodeAttnParams& params, cudaStream_t stream) {
  return launch_pair(decode_attn_kernel<Element, D, Warps, decode_shape::stages(D)>,
                     combine_kernel<Element, D, Warps, kCombineThreads>,
                     combine_kernel<Element, D, Warps, kCombineThreadsOfMany>, params, params, stream);
}

template <typename Element, int D>
cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream) {
  constexpr int kMaxWarps = decode_shape::max_warps(D);
  return params.warps == kMaxWarps ? launch_with_warps<Element, D, kMaxWarps>(params, stream)
                                   : launch_with_warps<Element, D, kMaxWarps / 2>(params, stream);
}

template <typename Element, int D>
cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream) {
  constexpr int kMaxWarps = decode_shape::quantized_warps(D), kMinWarps = decode_shape::kMinQuantizedWarps;
  DecodeAttnQuantizedParams with_bits = params;
  with_bits.code_bits = CodeElement<Element>::kBits;
  return launch_pair(params.attn.warps == kMaxWarps ? decode_attn_quantized_kernel<Element, D, kMaxWarps>
                                                    : decode_attn_quantized_kernel<Element, D, kMinWarps>,
                     combine_quantized_kernel<Element, D, kCombineThreads>,
                     combine_quantized_kernel<Element, D, kCombineThreadsOfMany>, with_bits, params.attn, stream);
}

// The one place that names a dtype and head dim: a file each.
#define ZIPVL_INSTANTIATE_DECODE_ATTN(Element, D)                                             \
  template cudaError_t launch_decode_attn<Element, D>(const DecodeAttnParams&, cudaStream_t); \
  template cudaError_t launch_decode_attn_quantized<Element, D>(const DecodeAttnQuantizedParams&, cudaStream_t);

}  // namespace zipvl::cuda::decode
