// Attention of one new token to a quantised cache. The blocks of both segments and the recent tokens of an item stand
// in one line of tiles, so that they are split together and a block of threads leaves one partial result of all three.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/decode_attn/params.h"
#include "cuda/decode_attn/sm80/kernel.cuh"
#include "cuda/decode_attn/sm80/quantized_block.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::decode_attn::sm80 {

// Tiles of a row: blocks of the first segment, blocks of the second, tiles of recent tokens.
struct QuantizedRowTiles {
  const DecodeAttnQuantizedParams& params;
  int batch, items_per_row;

  __device__ __forceinline__ explicit QuantizedRowTiles(const DecodeAttnQuantizedParams& all)
      : params(all),
        batch(static_cast<int>(all.attn.batch)),
        items_per_row(static_cast<int>(all.attn.kv_heads) * all.attn.head_chunks) {}

  struct Counts {
    int blocks[2], recent;
  };

  __device__ __forceinline__ int blocks(int kind, int b) const {
    const QuantizedSegment& segment = params.segments[kind];
    return min(max(__ldcg(segment.blocks + b * segment.blocks_stride), 0), segment.capacity);
  }
  __device__ __forceinline__ Counts count(int b) const {
    return {{blocks(0, b), blocks(1, b)}, params.attn.slots > 0 ? row_tiles(params.attn).count(b) : 0};
  }
  __device__ __forceinline__ int tiles(const Counts& counts) const {
    return counts.blocks[0] + counts.blocks[1] + (counts.recent + kTileTokens - 1) / kTileTokens;
  }
};

// A warp's tiles `at`, at + Warps, ... before `end` of a segment whose first tile is at `head`. Keys and values of a
// tile come in parts of its buffer: each is fetched anew as soon as it has been used. queries: the warp's.
template <typename Tile, int Warps, int D>
__device__ __forceinline__ void stream_segment(WarpState<D>& state, std::uint32_t queries, unsigned char* ring,
                                               const std::uint8_t* head, std::int64_t stride, int at, int end,
                                               float scale_log2, std::uint32_t code_bits) {
  constexpr int kStages = quantized_stages(Tile::kBits);
  // Opaque: or what is computed from it, for every number of bits, is computed before the first split, and spilled.
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x % kWarpThreads));
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
    Tile::softmax_weights(weights, state, queries, block, scale_log2, code_bits, lane);
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

// A warp's share of a split: its tiles of all three kinds, in this order.
template <typename ElementType, int D, int Warps>
__device__ __forceinline__ void attend_split(WarpState<D>& state, std::uint32_t queries,
                                             const DecodeAttnQuantizedParams& params,
                                             const Split<QuantizedRowTiles::Counts>& split, unsigned char* ring) {
  const DecodeAttnParams& attn = params.attn;
  int at = split.first + static_cast<int>(threadIdx.x / kWarpThreads), before = 0;
  float unit = 1.0F, factors[D / 32];
  load_factors<D>(factors,
                  params.v_factor + split.b * params.v_factor_stride[0] + split.head * params.v_factor_stride[1],
                  params.v_factor_stride[2], static_cast<int>(threadIdx.x % kWarpThreads));
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const QuantizedSegment& segment = params.segments[kind];
    const int tiles = kind == 0 ? split.counts.blocks[0] : split.counts.blocks[1], end = min(split.end - before, tiles);
    const int mine = at - before;
    if (mine < end) {
      const std::uint8_t* head = segment.packed + split.b * segment.stride[0] + split.head * segment.stride[1];
      const auto stream = [&](auto tile) {
        using Tile = decltype(tile);
        state.scale_upper(Tile::kValueUpper / unit);
        unit = Tile::kValueUpper;
        stream_segment<Tile, Warps>(state, queries, ring, head, segment.stride[2], mine, end, attn.scale_log2,
                                    params.code_bits);
      };
      if (segment.bits.keys == 2) {
        stream(QuantizedTile<ElementType, D, 2, 2>{});
      } else if (segment.bits.keys == 8) {
        stream(QuantizedTile<ElementType, D, 8, 8>{});
      } else if (segment.bits.values == 2) {
        stream(QuantizedTile<ElementType, D, 4, 2>{});
      } else {
        stream(QuantizedTile<ElementType, D, 4, 4>{});
      }
      at += (end - mine + Warps - 1) / Warps * Warps;
    }
    before += tiles;
  }
  if (split.first < before) {
    finish_codes(state, unit, factors, ptx::opaque(static_cast<int>(threadIdx.x % kWarpThreads)));
  }
  if (at < split.end) {
    using Tile = KvTile<ElementType, D>;
    const HeadRows<ElementType> rows = head_rows<ElementType>(attn, split, split.counts.recent);
    const std::uint32_t buffer = ptx::shared_address(ring);
    const int lane = ptx::opaque(static_cast<int>(threadIdx.x % kWarpThreads));
    for (; at < split.end; at += Warps) {
      const int first = (at - before) * kTileTokens;
      __syncwarp();
      Tile::fetch(buffer, rows, first, lane);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncwarp();
      std::uint32_t q[D / 32][4];
#pragma unroll
      for (int pair = 0; pair < D / 32; ++pair) {
        Queries<ElementType, D>::load_tiles(q[pair], queries, pair, lane);
      }
      Tile::attend(state, q, buffer, rows.length - first, attn.scale_log2, lane);
    }
  }
}

template <typename ElementType, int D, int Warps>
__global__ void __launch_bounds__(Warps* kWarpThreads, 1)
    decode_attn_quantized_kernel(const __grid_constant__ DecodeAttnQuantizedParams params) {
  static_assert(quantized_warp_bytes(D, {4, 2}, {4, 2}) >= kMergeBytes<D>);  // the smallest
  extern __shared__ __align__(128) unsigned char shared[];
  const QuantizedRowTiles tiles(params);
  const int warp_bytes = params.attn.shared_bytes / Warps;
  for_each_split<D, Warps, kMinQuantizedWarps>(
      params.attn, tiles, shared, warp_bytes, [&](WarpState<D>& state, const auto& split) {
        // A warp's queries, which there are no registers for, then its ring.
        unsigned char* own = shared + threadIdx.x / kWarpThreads * warp_bytes;
        const std::uint32_t queries = ptx::shared_address(own);
        if (split.first + static_cast<int>(threadIdx.x / kWarpThreads) < split.end) {
          fetch_queries<ElementType, D>(queries, params.attn, split, static_cast<int>(threadIdx.x % kWarpThreads));
        }
        attend_split<ElementType, D, Warps>(state, queries, params, split, own + query_bytes(D));
      });
}

}  // namespace zipvl::cuda::decode_attn::sm80
