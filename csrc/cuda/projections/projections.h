// Launches of what stands around the matrix products of skipped projections: chosen rows moved to the front, and
// results put back where they belong. No Torch. The chosen rows of all batch rows stand behind one another, so that one
// product serves a batch: those of batch row b from the sum of the counts before it. A launch serves a chunk of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/element.h"

namespace zipvl::cuda {

// Which rows: of those behind one another the ones from `first` on, `chunk` of them at most. Counts are clamped to
// [0, places]; an entry outside [0, tokens) names no row: its packed row is zeros, and nothing is put back for it.
struct ChosenRows {
  const std::int32_t* index;  // [batch, places]
  std::int64_t index_stride[2];
  const std::int32_t* count;  // [batch], or null: every place
  std::int64_t count_stride;
  std::int64_t batch, places, tokens;
  std::int64_t first, chunk;
};

// Both directions. Rows are of `row_vectors` times 16 bytes, and every row begins at a multiple of 16 bytes.
struct CopyRowsParams {
  ChosenRows chosen;
  void* packed;                 // [chunk, row_vectors] of 16 bytes; rows from `total` on unused
  void* full;                   // [batch, tokens, row_vectors] of 16 bytes, unit last stride
  std::int64_t full_stride[2];  // batch, token; in 16 bytes
  std::int64_t row_vectors;
  std::int32_t* total;  // [1], how many rows the chunk has, written; may be null
  int num_sms;          // of the device: what the grid is sized for
};

// packed = the chosen rows of full.
cudaError_t launch_gather_rows(const CopyRowsParams& params, cudaStream_t stream);

// The chosen rows of full = packed; other rows stay.
cudaError_t launch_scatter_rows(const CopyRowsParams& params, cudaStream_t stream);

// Queries from products: + bias, RMS norm of a head, rotary embedding, each rounded as transformers' modules round
// them.
struct PlaceQueriesParams {
  ChosenRows chosen;
  Element element;
  const void* packed;       // [chunk, heads, head_dim], as launch_gather_rows orders rows
  const void* bias;         // [heads, head_dim], or null
  const void* norm_weight;  // [head_dim], or null: no norm
  float norm_eps;
  const void* cos;             // [batch, tokens, head_dim], unit last stride
  const void* sin;             // the same
  std::int64_t cos_stride[2];  // batch (0: one for all), token; in elements
  std::int64_t sin_stride[2];
  void* q;  // [batch, tokens, heads, head_dim]; rows that are not chosen stay
  std::int64_t heads;
  int head_dim;  // a multiple of 4, up to kMaxHeadDim
  int num_sms;

  static constexpr int kMaxHeadDim = 256;  // a warp keeps a head in registers: 8 elements a lane
};

cudaError_t launch_place_queries(const PlaceQueriesParams& params, cudaStream_t stream);

}  // namespace zipvl::cuda
