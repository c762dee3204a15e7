// The parameters of decode_attn and decode_attn_quantized on CUDA, and their launches. No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/quantized_block.h"
#include "cuda/common/element.h"
#include "cuda/decode_attn/shape.h"

namespace zipvl::cuda {

constexpr int kDecodeHeads = decode_attn::kHeads;

// Partial results of split-KV attention: one for each split of a work item (schedule.cuh).
struct DecodePartials {
  float* out;  // [partials, kDecodeHeads, head_dim], each normalised on its own
  float* lse;  // [partials, kDecodeHeads], base 2
};

// Strides are in elements; those of the last dimension are 1, and every row begins at a multiple of 16 bytes. No slot
// at or after lengths[b], clamped to [0, slots], is read.
struct DecodeAttnParams {
  const void* q;                // [batch, query_heads, head_dim]
  const void* k;                // [batch, kv_heads, slots, head_dim]
  const void* v;                // [batch, kv_heads, slots, head_dim]
  const std::int32_t* lengths;  // [batch]
  void* out;                    // [batch, query_heads, head_dim], contiguous
  float* lse;                   // [batch, query_heads], natural
  DecodePartials partials;      // blocks + batch * kv_heads * head_chunks of them
  std::int64_t q_stride[2];     // batch, head
  std::int64_t k_stride[3];     // batch, head, slot
  std::int64_t v_stride[3];
  std::int64_t lengths_stride;
  std::int64_t batch, query_heads, kv_heads, slots;
  int head_dim;      // 64, 96, 128 or 256
  int head_chunks;   // ceil(query_heads / kv_heads / kDecodeHeads)
  int blocks;        // of the grid
  int warps;         // of a block: decode_attn::max_warps or half of that, quantized_warps or kMinQuantizedWarps
  int shared_bytes;  // of a block's warps
  float scale_log2;  // of scores before the softmax, times log2(e)
  Element element;
};

// One segment of a quantised cache: blocks of common/quantized_block.h. Strides are in bytes, multiples of 16.
struct QuantizedSegment {
  const std::uint8_t* packed;  // [batch, kv_heads, capacity, bytes of a block], aligned to 16 bytes
  const std::int32_t* blocks;  // [batch], used ones; clamped to [0, capacity]
  std::int64_t stride[3];      // batch, head, block
  std::int64_t blocks_stride;
  int capacity;
  quantized::Bits bits;  // of kSupportedBits
};

struct DecodeAttnQuantizedParams {
  // The queries, the outputs, and the recent tokens as a cache in full precision (slots 0: none).
  DecodeAttnParams attn;
  QuantizedSegment segments[2];
  const float* v_factor;  // [batch, kv_heads, head_dim]
  std::int64_t v_factor_stride[3];
  std::uint32_t code_bits;  // of the dtype's codes as elements; set by the launch
};

cudaError_t launch_decode_attn(const DecodeAttnParams& params, cudaStream_t stream);
cudaError_t launch_decode_attn_quantized(const DecodeAttnQuantizedParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
