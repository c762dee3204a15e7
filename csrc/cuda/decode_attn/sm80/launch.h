// The kernels of one dtype and head dim, each in a file of its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/decode_attn/decode_attn.h"
#include "cuda/decode_attn/quantized.h"

namespace zipvl::cuda::decode {

template <typename Element, int D>
cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream);

template <typename Element, int D>
cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda::decode
