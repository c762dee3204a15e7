// What the Hopper kernel reads besides its two tensor maps: ../params.h in the kernel's terms. No Torch.
#pragma once

#include <cstdint>

namespace zipvl::cuda::attn::sm90 {

struct AttnParams {
  const void* q;                 // [batch, query_heads, tokens, head_dim]
  std::int64_t q_stride[3];      // batch, head, token, in elements; multiples of 8
  void* out;                     // [batch, tokens, query_heads, head_dim], contiguous
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
};

}  // namespace zipvl::cuda::attn::sm90
