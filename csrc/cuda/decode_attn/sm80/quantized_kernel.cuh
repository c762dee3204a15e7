// Attention of one new token to a quantised cache. The blocks of both segments and the recent tokens of an item stand
// in one line of tiles, so that they are shared out together and a block of threads leaves one partial result of all
// three.
#pragma once

#include <cstdint>

#include "cuda/decode_attn/quantized.h"
#include "cuda/decode_attn/sm80/kernel.cuh"
#include "cuda/decode_attn/sm80/quantized_block.cuh"
#include "cuda/ptx/opaque.cuh"

namespace zipvl::cuda::decode {

// Tiles of a row: blocks of the first segment, blocks of the second, tiles of recent tokens.
struct LineOfTiles {
  const DecodeAttnQuantizedParams& params;
  int batch, items_per_row;

  __device__ __forceinline__ explicit LineOfTiles(const DecodeAttnQuantizedParams& all)
      : params(all),
        batch(static_cast<int>(all.attn.batch)),
        items_per_row(static_cast<int>(all.attn.kv_heads) * all.attn.head_chunks) {}

  __device__ __forceinline__ int blocks(int kind, int b) const {
    const QuantizedSegment& segment = params.segments[kind];
    return min(max(segment.blocks[b * segment.blocks_stride], 0), segment.capacity);
  }
  __device__ __forceinline__ int recent(int b) const {
    return params.attn.slots > 0 ? row_tiles(params.attn).count(b) : 0;
  }
  __device__ __forceinline__ int tiles(int b) const {
    return blocks(0, b) + blocks(1, b) + (recent(b) + kTileTokens - 1) / kTileTokens;
  }
};

// A warp's tiles `at`, at + Warps, ... before `end` of a segment whose first tile is at `head`. Keys and values of a
// tile come in parts of its buffer: each is fetched anew as soon as it has been used. q: the queries, of channel tile k
// and lane l at [32 k + l].
template <typename Tile, int Warps, int D>
__device__ __forceinline__ void stream_segment(WarpState<D>& state, const uint2* q, unsigned char* ring,
                                               const std::uint8_t* head, std::int64_t stride, int at, int end,
                                               float scale_log2) {
  constexpr int kStages = decode_shape::quantized_stages(Tile::kBits);
  // Opaque: or what is computed from it, for every number of bits, is computed before the first piece, and spilled.
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x % 32));
  const std::uint32_t ring_address = ptx::shared_address(ring) + 16 * lane;
  head += 16 * lane;
  const auto fetch_keys = [&](int slot, int tile) {
    if (tile < end) {
      Tile::fetch_keys(ring_address + slot * Tile::kBytes, head + tile * stride, lane);
    }
    ptx::cp_async_commit();
  };
  const auto fetch_values = [&](int slot, int tile) {
    if (tile < end) {
      Tile::fetch_values(ring_address + slot * Tile::kBytes, head + tile * stride, lane);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < kStages; ++slot) {
    fetch_keys(slot, at + slot * Warps);
    fetch_values(slot, at + slot * Warps);
  }
#pragma unroll 1
  for (int slot = 0; at < end; at += Warps) {
    const unsigned char* block = ring + slot * Tile::kBytes;
    std::uint32_t weights[Tile::kTokenTiles][2];
    ptx::cp_async_wait<2 * kStages - 1>();
    __syncwarp();
    Tile::weigh(weights, state, q, block, scale_log2, lane);
    __syncwarp();
    fetch_keys(slot, at + kStages * Warps);
    ptx::cp_async_wait<2 * kStages - 1>();
    __syncwarp();
    Tile::add_values(state, weights, block, lane);
    __syncwarp();
    fetch_values(slot, at + kStages * Warps);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
}

// What a warp attends to in a piece of the line: its tiles of all three kinds, in this order.
template <typename Element, int D, int Warps>
__device__ __forceinline__ void attend_piece(WarpState<D>& state, const uint2* q,
                                             const DecodeAttnQuantizedParams& params, const LineOfTiles& line,
                                             const Piece& piece, unsigned char* ring) {
  const DecodeAttnParams& attn = params.attn;
  int at = piece.first + static_cast<int>(threadIdx.x / 32), before = 0;
  float unit = 1.0F;
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const QuantizedSegment& segment = params.segments[kind];
    const int tiles = line.blocks(kind, piece.b), end = min(piece.end - before, tiles);
    const int mine = at - before;
    if (mine < end) {
      const std::uint8_t* head = segment.packed + piece.b * segment.stride[0] + piece.head * segment.stride[1];
      const auto stream = [&](auto tile) {
        using Tile = decltype(tile);
        state.scale_upper(Tile::kValueUpper / unit);
        unit = Tile::kValueUpper;
        stream_segment<Tile, Warps>(state, q, ring, head, segment.stride[2], mine, end, attn.scale_log2);
      };
      switch (segment.bits) {
        case 2:
          stream(QuantizedTile<Element, D, 2>{});
          break;
        case 4:
          stream(QuantizedTile<Element, D, 4>{});
          break;
        default:
          stream(QuantizedTile<Element, D, 8>{});
          break;
      }
      at += (end - mine + Warps - 1) / Warps * Warps;
    }
    before += tiles;
  }
  if (piece.first < before) {
    finish_codes(state, unit,
                 params.v_factor + piece.b * params.v_factor_stride[0] + piece.head * params.v_factor_stride[1],
                 params.v_factor_stride[2], ptx::opaque(static_cast<int>(threadIdx.x % 32)));
  }
  if (at < piece.end) {
    using Tile = KvTile<Element, D>;
    const HeadRows<Element> rows = head_rows<Element>(attn, piece, line.recent(piece.b));
    const std::uint32_t buffer = ptx::shared_address(ring);
    const int lane = ptx::opaque(static_cast<int>(threadIdx.x % 32));
    for (; at < piece.end; at += Warps) {
      const int first = (at - before) * kTileTokens;
      __syncwarp();
      Tile::fetch(buffer, rows, first, lane);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncwarp();
      std::uint32_t registers[D / 16][2];
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const uint2 pair = q[32 * k + lane];
        registers[k][0] = pair.x, registers[k][1] = pair.y;
      }
      Tile::attend(state, registers, buffer, rows.length - first, attn.scale_log2, lane);
    }
  }
}

template <typename Element, int D, int Warps>
__global__ void __launch_bounds__(Warps * 32, decode_shape::quantized_blocks(D))
    decode_attn_quantized_kernel(const __grid_constant__ DecodeAttnQuantizedParams params) {
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();  // after the wait: what starts then reads counts that earlier kernels wrote
  const LineOfTiles line(params);
  walk<Element, D, Warps>(
      params.attn, line, reinterpret_cast<float*>(shared),
      [&](WarpState<D>& state, const std::uint32_t (&q)[D / 16][2], const Piece& piece) {
        // A warp's queries, which there are no registers for, then its ring.
        const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
        unsigned char* own = shared + warp * (decode_shape::quantized_query_bytes(D) + params.ring_bytes);
        uint2* queries = reinterpret_cast<uint2*>(own);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
          queries[32 * k + lane] = {q[k][0], q[k][1]};
        }
        attend_piece<Element, D, Warps>(state, queries, params, line, piece,
                                        own + decode_shape::quantized_query_bytes(D));
      });
}

}  // namespace zipvl::cuda::decode
