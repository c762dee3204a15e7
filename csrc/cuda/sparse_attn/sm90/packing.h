// What pack_kv has to do before the Hopper kernel. No Torch.
#pragma once

#include "cuda/pack_kv/pack_kv.h"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/sm90/launch.h"

namespace zipvl::cuda::attn::sm90 {

// overlap_previous: PackKvParams'.
inline PackKvParams packing(const SparseAttnParams& attn, int num_sms, bool overlap_previous) {
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
  for (int dim = 0; dim < 3; ++dim) {
    params.k_stride[dim] = attn.k_stride[dim];
    params.v_stride[dim] = attn.v_stride[dim];
    params.k_packed_stride[dim] = params.v_packed_stride[dim] = packed_stride[dim];
  }
  params.index_stride[0] = attn.index_stride[0];
  params.index_stride[1] = attn.index_stride[1];
  params.batch = attn.batch;
  params.heads = attn.kv_heads;
  params.tokens = attn.tokens;
  params.capacity = attn.capacity;
  params.head_dim = attn.head_dim;
  params.element_bytes = 2;
  params.tail = kPackedRows;
  params.num_sms = num_sms;
  params.overlap_previous = overlap_previous;
  return params;
}

}  // namespace zipvl::cuda::attn::sm90
