// The Hopper family's view of a problem: what its kernel reads besides two tensor maps, and what pack_kv has to do
// before it. No Torch.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "cuda/pack_kv/pack_kv.h"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/plan.h"

namespace zipvl::cuda::sparse_attn::sm90 {

struct AttnParams {
  const void* q;             // [batch, query_heads, tokens, head_dim]
  std::int64_t q_stride[3];  // batch, head, token, in elements; multiples of 8
  void* out;                 // [batch, tokens, query_heads, head_dim], contiguous
  unsigned char* zeros;      // [batch, tokens, zero_row_bytes], or null
  std::int64_t zero_row_bytes;
  const std::int32_t* index;     // [batch, tokens]
  std::int64_t index_stride[2];  // in elements
  const std::int32_t* count;     // [batch]
  std::int64_t count_stride;
  const std::int32_t* seen;  // [batch, tokens]: selected tokens at or before each; null unless all_queries and causal
  int batch, query_heads, group;  // group: query heads a key/value head
  int tokens;
  int kv_heads;
  float scale_log2;  // scale * log2(e), above 0
  bool causal, all_queries;
  RowRanges ranges;  // of Traits::kRanged: `tokens` are the queries then, and index, count and seen are unused
  int keys;          // tokens that a list of keys may have
};

// How the copy engine reads a list of keys, a block or a few sinks at once.
struct RangedMaps {
  CUtensorMap k, v, sink_k, sink_v;
};

inline AttnParams attn_params(const SparseAttnParams& from, const std::int32_t* seen) {
  AttnParams params{};
  params.q = from.q;
  params.out = from.out;
  params.zeros = static_cast<unsigned char*>(from.zeros);
  params.zero_row_bytes = from.zero_row_bytes;
  params.index = from.index;
  params.count = from.count;
  params.count_stride = from.count_stride;
  params.seen = seen;
  std::copy_n(from.q_stride, 3, params.q_stride);
  std::copy_n(from.index_stride, 2, params.index_stride);
  params.batch = static_cast<int>(from.batch);
  params.query_heads = static_cast<int>(from.query_heads);
  params.kv_heads = static_cast<int>(from.kv_heads);
  params.group = params.query_heads / params.kv_heads;
  params.tokens = static_cast<int>(from.tokens);
  params.scale_log2 = from.scale * std::numbers::log2e_v<float>;
  params.causal = from.causal;
  params.all_queries = from.all_queries;
  params.ranges = from.ranges;
  params.keys = params.tokens;
  if (from.ranges.range != nullptr) {
    params.tokens = static_cast<int>(from.queries);
  }
  return params;
}

// The arguments of launch_pack_kv.
inline PackKvParams packing(const SparseAttnParams& attn, int num_sms) {
  PackKvParams params{};
  params.k = attn.k;
  params.v = attn.v;
  params.k_packed = attn.k_packed;
  params.v_packed = attn.v_packed;
  params.index = attn.index;
  params.count = attn.count;
  params.count_stride = attn.count_stride;
  const std::int64_t head = attn.capacity * attn.head_dim;
  const std::int64_t packed_stride[3] = {attn.kv_heads * head, head, attn.head_dim};
  std::copy_n(attn.k_stride, 3, params.k_stride);
  std::copy_n(attn.v_stride, 3, params.v_stride);
  std::copy_n(packed_stride, 3, params.k_packed_stride);
  std::copy_n(packed_stride, 3, params.v_packed_stride);
  std::copy_n(attn.index_stride, 2, params.index_stride);
  params.batch = attn.batch;
  params.heads = attn.kv_heads;
  params.tokens = attn.tokens;
  params.capacity = attn.capacity;
  params.head_dim = attn.head_dim;
  params.element_bytes = 2;
  params.tail = plan::kSparseAttnPackedRows;
  params.num_sms = num_sms;
  return params;
}

}  // namespace zipvl::cuda::sparse_attn::sm90
