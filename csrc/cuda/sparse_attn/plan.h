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

// Attention in which rows see what RowRanges says: a pass over the keys of the window, where there is one, and a pass
// over the selection, merged by log-sum-exp.
struct RangedAttnProblem {
  std::int64_t batch, query_heads, kv_heads, queries, tokens, head_dim;
  bool window;       // there is a pass over the window
  bool lists_real;   // that pass runs over the list of real tokens, not over all tokens as they lie
  bool all_queries;  // the pass over the selection has a row for every query
  SparseAttnKernel kernel;
};

// Byte offsets, each a multiple of 256; what a pass does not need has no bytes.
struct RangedAttnWorkspace {
  std::int64_t real_index, real_count;  // [B, S], [B] int32
  std::int64_t real_k, real_v;          // [B, Hkv, S, D] of a 16-bit dtype, kSm90
  std::int64_t window_range, window_group;
  std::int64_t range, group;     // [B, n] int2, [B, ceil(n / 32)] int4, as are those of the window
  std::int64_t query, num_rows;  // [B, n], [B] int32
  std::int64_t lse;              // [B, n, Hq] float32
  std::int64_t bytes;
};

RangedAttnWorkspace plan_ranged_attn(const RangedAttnProblem& problem);

}  // namespace zipvl::plan
