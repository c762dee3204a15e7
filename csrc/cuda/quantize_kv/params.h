// The parameters of quantize_kv on CUDA, and its launch. No Torch. Blocks: common/quantized_block.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "common/quantized_block.h"
#include "cuda/common/element.h"

namespace zipvl::cuda {

// Strides are in elements; k's and v's of the last dimension are 1. The workspaces need no initialisation but
// `largest`.
struct QuantizeKvParams {
  const void* k;              // [batch, heads, tokens, head_dim]
  const void* v;              // [batch, heads, tokens, head_dim]
  const std::int32_t* index;  // [batch, tokens]; entries outside [0, tokens) become tokens of zeros
  const std::int32_t* count;  // [batch], clamped to [0, tokens]
  const bool* token_mask;     // [batch, tokens], or null: all are real
  std::uint8_t* packed[2];    // [batch, heads, capacity, bytes of a block] of the high and the low segment
  std::int32_t* blocks[2];    // [batch], written
  float* v_factor;            // [batch, heads, head_dim]; written if `largest` is not null, else read
  std::uint32_t* largest;     // workspace [batch, heads, head_dim], zeros, or null: v_factor is given
  std::int32_t* chunk_rest;   // workspace [batch, chunks]: the low tokens of each chunk of kSplitChunk tokens
  std::int32_t* rest;         // workspace [batch, tokens]: the low segment's positions
  std::int32_t* rest_count;   // workspace [batch]
  std::int64_t k_stride[3];   // batch, head, token
  std::int64_t v_stride[3];
  std::int64_t index_stride[2];  // batch, place
  std::int64_t count_stride;
  std::int64_t mask_stride[2];  // batch, token
  std::int64_t batch, heads, tokens, capacity, chunks;
  int head_dim;                    // a multiple of 32
  quantized::Bits bits[2];         // of kSupportedBits
  std::optional<Element> element;  // none: float32
};
constexpr int kSplitChunk = 1024;

cudaError_t launch_quantize_kv(const QuantizeKvParams& params, cudaStream_t stream);

// Its steps: the positions of the low segment and both segments' counts; then the blocks.
cudaError_t launch_split_tokens(const QuantizeKvParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
