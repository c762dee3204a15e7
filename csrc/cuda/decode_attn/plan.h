// Which CUDA kernel runs a decode_attn or decode_attn_quantized, and what it needs beside inputs and outputs.
#pragma once

#include <cstdint>
#include <string>

#include "common/quantized_block.h"

namespace zipvl::plan {

struct DecodeAttnCudaProblem {
  std::int64_t batch, query_heads, kv_heads, head_dim;
  std::int64_t slots;   // of the cache in full precision
  bool half_precision;  // float16 or bfloat16
  bool aligned;         // every row of q and of the caches begins at a multiple of 16 bytes
  std::int64_t num_sms;
  std::int64_t shared_bytes;  // that a block of threads can have
};

// Segments of a quantised cache beside the cache in full precision.
struct QuantizedSegments {
  std::int64_t high_blocks, low_blocks;  // capacities
  quantized::Bits high_bits, low_bits;
};

struct DecodeAttnCudaPlan {
  std::string reason;         // why there is no kernel for this problem, or empty
  int warps;                  // of a block of threads
  int blocks;                 // of threads; how many have work is decided on the device
  int head_chunks;            // of a key/value head's query heads, each read the head's cache
  std::int64_t shared_bytes;  // of a block's warps
  std::int64_t partials;      // partial results: [heads of a chunk, head_dim] float32 each, and their log-sum-exps
  std::int64_t workspace_bytes;

  std::string describe() const;
};

DecodeAttnCudaPlan plan_decode_attn_cuda(const DecodeAttnCudaProblem& problem);
DecodeAttnCudaPlan plan_decode_attn_quantized_cuda(const DecodeAttnCudaProblem& problem,
                                                   const QuantizedSegments& segments);

}  // namespace zipvl::plan
