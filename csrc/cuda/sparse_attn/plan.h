// Which CUDA kernel runs a sparse_attn, and what it needs beside inputs and outputs.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

constexpr std::int64_t kSparseAttnMaxBatches = 64;  // batch rows in the Hopper scheduler's table in shared memory
// The most rows of a key block of the Hopper kernel: packed K and V must have zeros from a batch row's count up to the
// next multiple or the capacity, past which the copy engine reads 0.
constexpr std::int64_t kSparseAttnPackedRows = 128;

enum class SparseAttnKernel { kSm90, kSm80, kAten };

struct SparseAttnCudaProblem {
  std::int64_t batch, query_heads, kv_heads, tokens, head_dim;
  bool half_precision;  // float16 or bfloat16
  bool aligned;         // every row of q, k and v begins at a multiple of 16 bytes
  double scale;
  bool causal, all_queries;
  bool hopper;  // the device runs the sm_90 kernel
};

struct SparseAttnCudaPlan {
  SparseAttnKernel kernel;
  std::string reason;            // why the kernel is kAten, or empty
  std::int64_t capacity;         // packed rows of K and of V a head and batch row; 0: not packed
  bool seen_tokens;              // count the selected tokens before each token first
  std::int64_t workspace_bytes;  // packed K and V, seen tokens

  std::string describe() const;
};

SparseAttnCudaPlan plan_sparse_attn_cuda(const SparseAttnCudaProblem& problem);

}  // namespace zipvl::plan
