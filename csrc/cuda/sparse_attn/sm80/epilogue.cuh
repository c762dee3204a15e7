// Output rows from accumulators to their tokens' places, by way of the warp's own rows of the query tile, which nothing
// reads any more: so 16 bytes a lane and whole rows a warp go out.
#pragma once

#include <cstdint>

#include "cuda/sparse_attn/sm80/mma.cuh"
#include "cuda/sparse_attn/sm80/softmax.cuh"
#include "cuda/sparse_attn/sm80/traits.cuh"

namespace zipvl::cuda::attn::sm80 {

// out: token 0 of the head, row_elements a token.
template <typename Traits>
__device__ __forceinline__ void store_rows(const Output<Traits>& o, const RowState<Traits::kRowTiles>& rows,
                                           SharedStorage<Traits>& shared, typename Traits::Element* out,
                                           std::int64_t row_elements) {
  constexpr int kRows = 16 * Traits::kRowTiles;
  const int lane = threadIdx.x % kWarpThreads, first_row = threadIdx.x / kWarpThreads * kRows;
  char* tile = reinterpret_cast<char*>(shared.q) + first_row * Traits::kRowBytes;
  __syncwarp();  // every lane has read its last queries
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(rows.sum[m][i]);
      const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;  // a row that sees no key is 0; NaN stays
      const int row = m * 16 + i * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < Traits::kHeadDim / 8; ++j) {
        *reinterpret_cast<std::uint32_t*>(tile + Traits::offset(row, j) + lane % 4 * 4) =
            pack_pair<typename Traits::Element>(o[m][j][2 * i] * inverse, o[m][j][2 * i + 1] * inverse);
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = Traits::kHeadDim / kChunkElements;
#pragma unroll 4
  for (int at = lane; at < kRows * kChunks; at += kWarpThreads) {
    const int row = at / kChunks, chunk = at % kChunks;
    if (first_row + row < shared.queries) {
      *reinterpret_cast<uint4*>(out + shared.query_token[first_row + row] * row_elements + chunk * kChunkElements) =
          *reinterpret_cast<const uint4*>(tile + Traits::offset(row, chunk));
    }
  }
}

}  // namespace zipvl::cuda::attn::sm80
