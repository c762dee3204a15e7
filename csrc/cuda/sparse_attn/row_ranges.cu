// Which places of a list of keys each query row sees (docs/ops.md, steps 5b to 5d): within its window, or before it.
// One thread a row, and a warp sums up 32 rows, so that a tile of rows knows its blocks of keys by a few loads.
#include <climits>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/sparse_attn/params.h"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kRowGroup == kWarpThreads);

// A sorted list of tokens, or all tokens.
struct TokenList {
  const std::int32_t* entries;  // null: all
  std::int64_t stride;
  int count;  // in [0, tokens], whatever stands in the tensor

  __device__ TokenList(const std::int32_t* index, const std::int64_t (&strides)[2], const std::int32_t* counts,
                       std::int64_t count_stride, int b, int tokens)
      : entries(index == nullptr ? nullptr : index + b * strides[0]),
        stride(strides[1]),
        count(index == nullptr ? tokens : min(max(counts[b * count_stride], 0), tokens)) {}

  __device__ int token(int place) const { return entries == nullptr ? place : entries[place * stride]; }

  // How many of the list are at or before `last`.
  __device__ int up_to(int last) const {
    if (entries == nullptr) {
      return min(max(last + 1, 0), count);
    }
    int low = 0, high = count;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (entries[middle * stride] <= last) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The keys of the token at `position`; none where it is not real.
__device__ int2 range_of(const RowRangesParams& params, const RowRangesPass& pass, const TokenList& keys, int b,
                         int position) {
  if (params.token_mask != nullptr &&
      !params.token_mask[b * params.mask_stride[0] + position * params.mask_stride[1]]) {
    return make_int2(0, 0);
  }
  int last = position;
  if (params.last_key != nullptr) {
    const int query = position - (params.tokens - params.queries);
    last = params.last_key[b * params.last_key_stride[0] + query * params.last_key_stride[1]];
    last = min(max(last, -1), params.tokens - 1);
  }
  // The last token before the window.
  const int before_window = params.local_window > 0 ? min(last, position - params.local_window) : last;
  if (pass.in_window) {
    const int end = keys.up_to(last);
    return make_int2(min(keys.up_to(before_window), end), end);
  }
  int sinks_end = params.num_sinks - 1;  // the last sink
  if (params.num_sinks > 0 && params.token_mask != nullptr) {
    const int real = min(params.num_sinks, params.real_count[b]);
    sinks_end = real > 0 ? params.real_index[static_cast<std::int64_t>(b) * params.tokens + real - 1] : -1;
  }
  const int end = keys.up_to(before_window);
  return make_int2(params.num_sinks > 0 ? min(keys.up_to(sinks_end), end) : 0, end);
}

__global__ void __launch_bounds__(kThreads) row_ranges_kernel(const __grid_constant__ RowRangesParams params) {
  ptx::launch_dependent_grids();
  ptx::wait_on_dependent_grids();
  const RowRangesPass& pass = params.pass[blockIdx.z];
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int offset = params.tokens - params.queries;
  const int groups = (params.queries + kRowGroup - 1) / kRowGroup;
  for (int b = static_cast<int>(blockIdx.y); b < params.batch; b += static_cast<int>(gridDim.y)) {
    const TokenList keys(pass.key_index, pass.key_index_stride, pass.key_count, pass.key_count_stride, b,
                         params.tokens);
    const std::int64_t at = static_cast<std::int64_t>(b) * params.queries + row;
    int rows = params.queries, position = offset + row;
    if (pass.query != nullptr) {
      const TokenList of_rows(pass.row_index, pass.row_index_stride, pass.row_count, pass.row_count_stride, b,
                              params.tokens);
      const int first = offset > 0 ? of_rows.up_to(offset - 1) : 0;
      rows = of_rows.count - first;
      position = row < rows ? min(max(of_rows.token(first + row), offset), params.tokens - 1) : offset;
      if (row < params.queries) {
        pass.query[at] = position - offset;
      }
      if (row == 0) {
        pass.num_rows[b] = rows;
      }
    }
    const bool exists = row < min(rows, params.queries);
    const int2 range = exists ? range_of(params, pass, keys, b, position) : make_int2(0, 0);
    if (row < params.queries) {
      pass.range[at] = range;
    }
    const bool sees = range.x < range.y;
    const int min_begin = __reduce_min_sync(kAllLanes, sees ? range.x : INT_MAX);
    const int max_end = __reduce_max_sync(kAllLanes, sees ? range.y : 0);
    const int max_begin = __reduce_max_sync(kAllLanes, exists ? range.x : 0);
    const int min_end = __reduce_min_sync(kAllLanes, !exists ? INT_MAX : sees ? range.y : 0);
    if (threadIdx.x % kRowGroup == 0 && row < params.queries) {
      pass.group[static_cast<std::int64_t>(b) * groups + row / kRowGroup] =
          make_int4(min_begin, max_end, max_begin, min_end);
    }
  }
}

}  // namespace

cudaError_t launch_row_ranges(const RowRangesParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.queries, kThreads)),
                  static_cast<unsigned>(params.batch < kMaxGridYZ ? params.batch : kMaxGridYZ),
                  static_cast<unsigned>(params.passes));
  return launch_dependent(&row_ranges_kernel, grid, kThreads, 0, stream, params);
}

}  // namespace zipvl::cuda
