// Shapes of the decoding kernels that plans and launches must agree on.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/quantized_block.h"

namespace zipvl::cuda::decode_attn {

constexpr int kTileTokens = 16;  // rows of an mma.m16n8k16
// A block of threads serves up to so many query heads of a key/value head at once: the columns of an mma.m16n8k16.
constexpr int kHeads = 8;

// Buffers of each warp's ring. At least half of the ring is under way: 64 KB a multiprocessor, where 40 KB hide the
// latency of memory at 4 TB/s. On an H200 three buffers at head dim 128 are no faster than two.
ZIPVL_HOST_DEVICE constexpr int stages(std::int64_t head_dim) { return head_dim == 64 ? 4 : head_dim == 96 ? 3 : 2; }

// Warps of a block of threads, one block a multiprocessor: fewer blocks leave fewer partial results (4 warps, two
// blocks a multiprocessor: 1 us longer). Head dim 256 has the registers of 4.
ZIPVL_HOST_DEVICE constexpr int max_warps(std::int64_t head_dim) { return head_dim == 256 ? 4 : 8; }

// A warp's queries: a row a head, 16 bytes longer than its channels.
ZIPVL_HOST_DEVICE constexpr int query_bytes(std::int64_t head_dim) {
  return static_cast<int>(kHeads * (head_dim * 2 + 16));
}

// Shared memory of a block of threads beside that of its warps, at most.
constexpr int kBlockBytes = 128;

// Shared memory of a warp.
ZIPVL_HOST_DEVICE constexpr std::int64_t warp_bytes(std::int64_t head_dim) {
  return query_bytes(head_dim) + stages(head_dim) * kTileTokens * head_dim * 4;
}

// The kernel over quantised segments: warps of a block of threads, one block a multiprocessor. It waits for its own
// instructions more than for memory: 12 warps with 168 registers each (head dim 256: 8 with 255). On an H200 16 warps
// with 128 registers, which do not hold the loop over the keys unrolled, take the same time at head dim 128. Where
// shared memory does not hold their rings (head dim 256 at 8 bits, GPUs with 99 KB) blocks have the fewest warps.
ZIPVL_HOST_DEVICE constexpr int quantized_warps(std::int64_t head_dim) { return head_dim == 256 ? 8 : 12; }
constexpr int kMinQuantizedWarps = 4;
// Buffers of a warp's ring, each of a block of 64 tokens.
ZIPVL_HOST_DEVICE constexpr int quantized_stages(quantized::Bits bits) { return bits.keys == 2 ? 2 : 1; }

// Shared memory of a warp: its queries, and a ring of either segment's blocks or of one tile of recent tokens.
ZIPVL_HOST_DEVICE constexpr std::int64_t quantized_warp_bytes(std::int64_t head_dim, quantized::Bits high_bits,
                                                              quantized::Bits low_bits) {
  std::int64_t ring = kTileTokens * head_dim * 4;
  const quantized::Bits both[] = {high_bits, low_bits};
  for (const quantized::Bits bits : both) {
    const std::int64_t bytes = quantized_stages(bits) * quantized::block_layout(head_dim, bits, 2).bytes;
    ring = bytes > ring ? bytes : ring;
  }
  return query_bytes(head_dim) + ring;
}

}  // namespace zipvl::cuda::decode_attn
