// One sparse_attn problem as the kernels take it. No Torch.
#pragma once

#include <cstdint>

#include "cuda/common/tensor_map.h"

namespace zipvl::cuda {

struct SparseAttnParams {
  // Strides are of batch, head and token, in elements; the last dimension's is 1. Every row starts at a multiple of 16
  // bytes, so strides of dimensions larger than 1 are multiples of 8.
  const void* q;  // [batch, query_heads, tokens, head_dim]
  const void* k;  // [batch, kv_heads, tokens, head_dim]
  const void* v;  // [batch, kv_heads, tokens, head_dim]
  std::int64_t q_stride[3], k_stride[3], v_stride[3];
  void* out;  // [batch, tokens, query_heads, head_dim], contiguous, aligned to 16 bytes; every element is written

  const std::int32_t* index;  // [batch, tokens], strides index_stride in elements; the first count of a row ascend
  std::int64_t index_stride[2];
  const std::int32_t* count;  // [batch], stride count_stride
  std::int64_t count_stride;

  // Workspace [batch, kv_heads, capacity, head_dim], contiguous, for families that pack K and V; null otherwise.
  void *k_packed, *v_packed;
  std::int64_t capacity;

  std::int64_t batch, query_heads, kv_heads, tokens;  // query_heads % kv_heads == 0; tokens below 2**31
  int head_dim;                                       // 64, 96, 128 or 256
  Element element;
  float scale;  // above 0
  bool causal, all_queries;
};

}  // namespace zipvl::cuda
