// The selected rows of K and V into the blocks of a paged cache. Bytes only: a group of lanes moves a row of K and the
// same one of V, a vector a lane. The grid does not know how many rows there are: each block reads count and strides
// over the tiles of rows that the slots of its batch row hold. Heads are the grid's fastest dimension, as in pack_kv.
#include <algorithm>
#include <bit>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/pack_paged/params.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 128;
// 2 tensors x 16 bytes x 1,280 threads = 40 KB in flight on a multiprocessor; 25 KB hide the latency of memory.
constexpr int kBlocksPerSm = 10;  // resident, at up to 48 registers a thread
constexpr int kWaves = 2;         // as in pack_kv: blocks for each that is resident

// The part of one batch row that is written: `count` entries of index from `skipped` on, to slots from `first` on.
struct Rows {
  int skipped, count;
  std::int64_t first;
};

__device__ Rows rows_of(const PackPagedParams& params, std::int64_t b) {
  const int given = params.count[b * params.count_stride];
  const int selected = min(max(given, 0), static_cast<int>(params.tokens));
  const int first = params.first_slot == nullptr ? 0 : params.first_slot[b * params.first_slot_stride];
  std::int64_t room = first < 0 ? 0 : params.table_blocks * params.block_size - first;
  if (params.capacity != nullptr) {
    room = min(room, std::int64_t{params.capacity[b * params.capacity_stride]});
  }
  const int count = static_cast<int>(min(std::int64_t{selected}, max(room, std::int64_t{0})));
  return {selected - count, count, first};
}

// Vector: what one lane moves at once. lanes: of a row, a power of two up to 32. row_vectors: Vectors of a row.
template <typename Vector>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pack_paged_kernel(const __grid_constant__ PackPagedParams params, int lanes, int row_vectors) {
  // In this order: once the next kernel starts, whatever came before this one is done and may be read.
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();
  const int tile_rows = kThreads / lanes, lane = threadIdx.x % lanes;
  const std::int64_t head = blockIdx.x;
  for (std::int64_t b = blockIdx.z; b < params.batch; b += gridDim.z) {
    const Rows rows = rows_of(params, b);
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
      params.stored[b] = rows.count;
    }
    const auto* k = static_cast<const Vector*>(params.k) + b * params.k_stride[0] + head * params.k_stride[1];
    const auto* v = static_cast<const Vector*>(params.v) + b * params.v_stride[0] + head * params.v_stride[1];
    auto* k_cache = static_cast<Vector*>(params.k_cache) + head * params.k_cache_stride[2];
    auto* v_cache = static_cast<Vector*>(params.v_cache) + head * params.v_cache_stride[2];
    for (std::int64_t row = std::int64_t{blockIdx.y} * tile_rows + threadIdx.x / lanes; row < rows.count;
         row += std::int64_t{gridDim.y} * tile_rows) {
      const std::int64_t place = b * params.index_stride[0] + (rows.skipped + row) * params.index_stride[1];
      const std::int64_t token = params.index[place], slot = rows.first + row;
      const std::int64_t table_block = slot / params.block_size, offset = slot - table_block * params.block_size;
      const std::int64_t block = params.block_table[b * params.table_stride[0] + table_block * params.table_stride[1]];
      if (token < 0 || token >= params.tokens || block < 0 || block >= params.blocks) {
        continue;
      }
      const Vector *from_k = k + token * params.k_stride[2], *from_v = v + token * params.v_stride[2];
      Vector* to_k = k_cache + block * params.k_cache_stride[0] + offset * params.k_cache_stride[1];
      Vector* to_v = v_cache + block * params.v_cache_stride[0] + offset * params.v_cache_stride[1];
      for (int vector = lane; vector < row_vectors; vector += lanes) {
        const Vector of_k = from_k[vector], of_v = from_v[vector];
        to_k[vector] = of_k;
        to_v[vector] = of_v;
      }
    }
  }
}

// The widest vector, up to 16 bytes, that every row of every tensor starts at a multiple of and consists of.
int vector_bytes(const PackPagedParams& params) {
  const std::int64_t element = params.element_bytes;
  std::uint64_t bits = static_cast<std::uint64_t>(params.head_dim * element) | 16;
  for (const void* base :
       {params.k, params.v, static_cast<const void*>(params.k_cache), static_cast<const void*>(params.v_cache)}) {
    bits |= reinterpret_cast<std::uintptr_t>(base);
  }
  for (const std::int64_t* strides : {params.k_stride, params.v_stride, params.k_cache_stride, params.v_cache_stride}) {
    for (int d = 0; d < 3; ++d) {
      bits |= static_cast<std::uint64_t>(strides[d] * element);
    }
  }
  return 1 << std::countr_zero(bits);
}

template <typename Vector>
cudaError_t launch(PackPagedParams params, cudaStream_t stream) {
  // From here on the strides of K, V and the caches count Vectors.
  for (std::int64_t* strides : {params.k_stride, params.v_stride, params.k_cache_stride, params.v_cache_stride}) {
    for (int d = 0; d < 3; ++d) {
      strides[d] = strides[d] * params.element_bytes / static_cast<std::int64_t>(sizeof(Vector));
    }
  }
  const auto row_vectors =
      static_cast<int>(params.head_dim * params.element_bytes / static_cast<std::int64_t>(sizeof(Vector)));
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::min(row_vectors, kWarpThreads))));
  const std::int64_t max_rows = std::min(params.tokens, params.table_blocks * params.block_size);
  const std::int64_t tiles = std::min(ceil_div<std::int64_t>(max_rows, kThreads / lanes), kMaxGridYZ);
  const std::int64_t batch_blocks = std::min(params.batch, kMaxGridYZ);
  const std::int64_t max_blocks = std::int64_t{params.num_sms} * kBlocksPerSm * kWaves;
  const std::int64_t blocks = std::clamp<std::int64_t>(max_blocks / (batch_blocks * params.heads), 1, tiles);
  const dim3 grid(static_cast<unsigned>(params.heads), static_cast<unsigned>(blocks),
                  static_cast<unsigned>(batch_blocks));
  return launch_dependent(pack_paged_kernel<Vector>, grid, kThreads, 0, stream, params, lanes, row_vectors);
}

}  // namespace

cudaError_t launch_pack_paged(const PackPagedParams& params, cudaStream_t stream) {
  switch (vector_bytes(params)) {
    case 16:
      return launch<uint4>(params, stream);
    case 8:
      return launch<uint2>(params, stream);
    case 4:
      return launch<unsigned int>(params, stream);
    default:
      return launch<unsigned short>(params, stream);
  }
}

}  // namespace zipvl::cuda
