// The checks that quantize_kv and decode_attn_quantized share.
#pragma once

#include "common/quantized_block.h"
#include "ops/checks.h"

namespace zipvl::checks {

inline void bits(const char* op, const char* name, std::int64_t value) {
  if (value != 2 && value != 4 && value != 8) {
    fail(op, name, " must be 2, 4 or 8, got ", value);
  }
}

inline void quantized_head_dim(const char* op, Named argument) {
  const std::int64_t head_dim = argument.tensor.size(3);
  if (head_dim % quantized::kChannelMultiple != 0) {
    fail(op, argument.name, " must have a head dim that is a multiple of ", quantized::kChannelMultiple, ", got ",
         head_dim);
  }
}

// v_factor [B, Hkv, D] float32, for tensors like `like` [B, H, N, D].
inline void value_factor(const char* op, const Tensor& v_factor, const Tensor& like, std::int64_t kv_heads) {
  const Named argument{"v_factor", v_factor};
  dtype(op, argument, ScalarType::Float);
  shape(op, argument, {like.size(0), kv_heads, like.size(3)});
  same_device(op, like, argument);
}

}  // namespace zipvl::checks
