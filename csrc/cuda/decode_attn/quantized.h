// Launch of decode_attn_quantized on CUDA. No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/decode_attn/decode_attn.h"

namespace zipvl::cuda {

// One segment of a quantised cache: blocks of common/quantized_block.h. Strides are in bytes, multiples of 16.
struct QuantizedSegment {
  const std::uint8_t* packed;  // [batch, kv_heads, capacity, bytes of a block], aligned to 16 bytes
  const std::int32_t* blocks;  // [batch], used ones; clamped to [0, capacity]
  std::int64_t stride[3];      // batch, head, block
  std::int64_t blocks_stride;
  int capacity;
  int bits;  // 2, 4 or 8
};

struct DecodeAttnQuantizedParams {
  // The queries, the outputs, and the recent tokens as a cache in full precision (slots 0: none).
  DecodeAttnParams attn;
  QuantizedSegment segments[2];
  const float* v_factor;  // [batch, kv_heads, head_dim]
  std::int64_t v_factor_stride[3];
  std::uint32_t code_bits;  // of the dtype's codes as elements; set by the launch
};

cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
