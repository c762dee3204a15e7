// Launch of the gather of selected K and V rows on CUDA. No Torch. Used by the op pack_kv and by sparse_attn.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

// Strides are in elements; those of the last dimension are 1. No byte outside the tensors is touched whatever `index`
// and `count` hold: counts are clamped to [0, min(tokens, capacity)], rows of positions outside [0, tokens) become 0.
struct PackKvParams {
  const void* k;              // [batch, heads, tokens, head_dim]
  const void* v;              // [batch, heads, tokens, head_dim]
  void* k_packed;             // [batch, heads, capacity, head_dim]
  void* v_packed;             // [batch, heads, capacity, head_dim]
  const std::int32_t* index;  // [batch, tokens]
  const std::int32_t* count;  // [batch]
  std::int64_t k_stride[3];   // batch, head, token
  std::int64_t v_stride[3];
  std::int64_t k_packed_stride[3];  // batch, head, row
  std::int64_t v_packed_stride[3];
  std::int64_t index_stride[2];  // batch, place
  std::int64_t count_stride;
  std::int64_t batch, heads, tokens, capacity, head_dim;
  int element_bytes;  // 2 or 4
  // Rows from count on, up to the next multiple of `tail` and never beyond `capacity`, are written as zeros, so that a
  // tile of `tail` rows holds no garbage. 1: none is.
  std::int64_t tail;
  int num_sms;  // of the device: what the grid is sized for
};

// A dependent launch (common/launch.h). The kernel itself lets the next one start as soon as it runs.
cudaError_t launch_pack_kv(const PackKvParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
