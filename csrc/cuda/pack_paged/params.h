// Launch of pack_paged on CUDA: selected K and V rows into the blocks of a paged cache. No Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace zipvl::cuda {

// Strides are in elements; those of the last dimension are 1. Counts, capacities, positions and blocks may hold
// anything: no byte outside the tensors is touched.
struct PackPagedParams {
  const void* k;                    // [batch, heads, tokens, head_dim]
  const void* v;                    // [batch, heads, tokens, head_dim]
  void* k_cache;                    // [blocks, block_size, heads, head_dim]
  void* v_cache;                    // [blocks, block_size, heads, head_dim]
  const std::int32_t* index;        // [batch, tokens]
  const std::int32_t* count;        // [batch]
  const std::int32_t* block_table;  // [batch, table_blocks]
  const std::int32_t* capacity;     // [batch], or null: as many as the table has slots
  const std::int32_t* first_slot;   // [batch], or null: 0
  std::int32_t* stored;             // [batch], contiguous
  std::int64_t k_stride[3];         // batch, head, token
  std::int64_t v_stride[3];
  std::int64_t k_cache_stride[3];  // block, slot, head
  std::int64_t v_cache_stride[3];
  std::int64_t index_stride[2];  // batch, place
  std::int64_t table_stride[2];  // batch, block
  std::int64_t count_stride, capacity_stride, first_slot_stride;
  std::int64_t batch, heads, tokens, head_dim, blocks, block_size, table_blocks;  // none is 0
  int element_bytes;                                                              // 2 or 4
  int num_sms;  // of the device: what the grid is sized for
};

// A dependent launch (common/launch.h). The kernel itself lets the next one start as soon as it runs.
cudaError_t launch_pack_paged(const PackPagedParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
