// Attention of one new token to a quantised cache: both segments, then the recent tokens, each kind shared out among
// all blocks of threads and leaving partial results of its own.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/quantized.h"
#include "cuda/decode_attn/sm80/kernel.cuh"
#include "cuda/decode_attn/sm80/quantized_block.cuh"

namespace zipvl::cuda::decode {

constexpr int kKinds = 3;  // of tiles: high, low, recent

__device__ __forceinline__ RowTiles segment_tiles(const DecodeAttnQuantizedParams& params, int kind) {
  const QuantizedSegment& segment = params.segments[kind];
  return {segment.blocks,
          segment.blocks_stride,
          segment.capacity,
          1,
          static_cast<int>(params.attn.batch),
          static_cast<int>(params.attn.kv_heads) * params.attn.head_chunks};
}

// Places of the partial results of one kind of tiles.
__host__ __device__ inline std::int64_t places_of_kind(const DecodeAttnParams& params) {
  return params.blocks + params.batch * params.kv_heads * params.head_chunks;
}

template <typename Element, int D, int Bits, int Warps>
__device__ __forceinline__ void walk_segment(const DecodeAttnQuantizedParams& params, int kind, int block,
                                             unsigned char* shared) {
  using Tile = QuantizedTile<Element, D, Bits>;
  constexpr int kStages = decode_shape::quantized_stages(Bits);
  const QuantizedSegment& segment = params.segments[kind];
  unsigned char* own = shared + threadIdx.x / 32 * (kStages * Tile::kBytes);
  const std::uint32_t ring = ptx::shared_address(own);
  const float scale_log2 = params.attn.scale * kLog2E;
  walk<Element, D, Warps>(
      params.attn, segment_tiles(params, kind), block, kind * places_of_kind(params.attn),
      reinterpret_cast<float*>(shared),
      [&](WarpState<D>& state, const std::uint32_t (&q)[D / 16][2], const Piece& piece) {
        const std::uint8_t* head = segment.packed + piece.b * segment.stride[0] + piece.head * segment.stride[1];
        stream_tiles<Warps, kStages, Tile::kBytes>(
            ring, piece.first, piece.end,
            [&](std::uint32_t buffer, int tile) { Tile::fetch(buffer, head + tile * segment.stride[2]); },
            [&](std::uint32_t buffer, int) { Tile::attend(state, q, own + (buffer - ring), scale_log2); });
        Tile::finish(state,
                     params.v_factor + piece.b * params.v_factor_stride[0] + piece.head * params.v_factor_stride[1],
                     params.v_factor_stride[2]);
      });
}

template <typename Element, int D, int Warps>
__global__ void __launch_bounds__(Warps * 32, 1)
    decode_attn_quantized_kernel(const __grid_constant__ DecodeAttnQuantizedParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();  // after the wait: what starts then reads counts that earlier kernels wrote
  for (int kind = 0; kind < 2; ++kind) {
    // Short segments end before the last block: the first one is shared out from the other end.
    const int block = static_cast<int>(kind == 0 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    switch (params.segments[kind].bits) {
      case 2:
        walk_segment<Element, D, 2, Warps>(params, kind, block, shared);
        break;
      case 4:
        walk_segment<Element, D, 4, Warps>(params, kind, block, shared);
        break;
      default:
        walk_segment<Element, D, 8, Warps>(params, kind, block, shared);
        break;
    }
  }
  if (params.attn.slots > 0) {
    walk_full<Element, D, Warps, decode_shape::kQuantizedFullStages>(
        params.attn, static_cast<int>(gridDim.x - 1 - blockIdx.x), 2 * places_of_kind(params.attn), shared);
  }
}

}  // namespace zipvl::cuda::decode
