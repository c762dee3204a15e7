// The selected rows of K and V, moved to the front. Bytes only: a lane moves one vector of a row of K and the same one
// of V, a group of lanes covers a row, and each lane keeps kRowsInFlight rows of both in flight. The grid does not know
// count: each block reads it and strides over the tiles of rows there are. Heads are the grid's fastest dimension: in a
// [batch, tokens, heads, head_dim] layout the heads of a token lie together, and so are read together.
#include <algorithm>
#include <bit>

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/pack_kv/pack_kv.h"
#include "cuda/ptx/dependent_launch.cuh"

namespace zipvl::cuda {
namespace {

constexpr int kThreads = 128;
// 2 tensors x 2 rows x 16 bytes x 1,280 threads = 80 KB in flight on a multiprocessor; 25 KB hide the latency of
// memory. 4 and 8 rows a lane leave too few tiles for short prompts: 4.2 and 4.4 us for 4.1 at 4,096 tokens.
constexpr int kRowsInFlight = 2;
constexpr int kBlocksPerSm = 10;  // resident, at 48 registers a thread
// Blocks for each that is resident: with 1 the last tiles leave multiprocessors idle (38.0 us for 37.3 at 131,072
// tokens), with 16 the blocks that find nothing to do cost more than that (48.5).
constexpr int kWaves = 2;
constexpr std::int64_t kMaxGrid = 65535;  // gridDim.y and gridDim.z

// Rows to copy and to zero of one batch row. Rows and positions fit an int, as every entry of index does.
struct Rows {
  int count, end;
};

__device__ Rows rows_of(const PackKvParams& params, std::int64_t b) {
  const int tail = static_cast<int>(params.tail);
  const int given = params.count[b * params.count_stride];
  const int count = min(max(given, 0), static_cast<int>(min(params.tokens, params.capacity)));
  const std::int64_t rounded = static_cast<std::int64_t>((count + tail - 1) / tail) * tail;
  return {count, static_cast<int>(min(rounded, params.capacity))};
}

// The entries of index at rows first, first + step, ...; -1 beyond its end.
__device__ void read_index(int (&entry)[kRowsInFlight], const PackKvParams& params, const std::int32_t* index,
                           int first, int step) {
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    const int row = first + i * step;
    entry[i] = row < params.tokens ? index[row * params.index_stride[1]] : -1;
  }
}

// Vector: what one lane moves at once. lanes: of a row, a power of two up to 32. row_vectors: Vectors of a row.
template <typename Vector>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pack_kv_kernel(const __grid_constant__ PackKvParams params, int lanes, int row_vectors) {
  // In this order: once the next kernel starts, whatever came before this one is done and may be read.
  ptx::wait_on_dependent_grids();
  ptx::launch_dependent_grids();
  const int rows_at_once = kThreads / lanes, lane = threadIdx.x % lanes, first = threadIdx.x / lanes;
  const int tile_rows = rows_at_once * kRowsInFlight;
  for (std::int64_t b = blockIdx.z; b < params.batch; b += gridDim.z) {
    const std::int32_t* index = params.index + b * params.index_stride[0];
    const std::int64_t head = blockIdx.x;
    const auto* k = static_cast<const Vector*>(params.k) + b * params.k_stride[0] + head * params.k_stride[1];
    const auto* v = static_cast<const Vector*>(params.v) + b * params.v_stride[0] + head * params.v_stride[1];
    auto* k_packed =
        static_cast<Vector*>(params.k_packed) + b * params.k_packed_stride[0] + head * params.k_packed_stride[1];
    auto* v_packed =
        static_cast<Vector*>(params.v_packed) + b * params.v_packed_stride[0] + head * params.v_packed_stride[1];
    const int step = static_cast<int>(gridDim.y) * tile_rows;
    int start = static_cast<int>(blockIdx.y) * tile_rows + first;
    // Read ahead, before count is known and while the tile before is copied: an entry past count is read and not used.
    int entry[kRowsInFlight];
    read_index(entry, params, index, start, rows_at_once);
    const Rows rows = rows_of(params, b);
    for (; start < rows.end; start += step) {
      int position[kRowsInFlight];  // -1: a row of zeros
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const bool copied = start + i * rows_at_once < rows.count && entry[i] < params.tokens;
        position[i] = copied ? entry[i] : -1;
      }
      read_index(entry, params, index, start + step, rows_at_once);
      for (int vector = lane; vector < row_vectors; vector += lanes) {
        Vector from_k[kRowsInFlight], from_v[kRowsInFlight];
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          from_k[i] = position[i] < 0 ? Vector{} : k[position[i] * params.k_stride[2] + vector];
          from_v[i] = position[i] < 0 ? Vector{} : v[position[i] * params.v_stride[2] + vector];
        }
#pragma unroll
        for (int i = 0; i < kRowsInFlight; ++i) {
          const int row = start + i * rows_at_once;
          if (row < rows.end) {
            k_packed[row * params.k_packed_stride[2] + vector] = from_k[i];
            v_packed[row * params.v_packed_stride[2] + vector] = from_v[i];
          }
        }
      }
    }
  }
}

// The widest vector, up to 16 bytes, that every row of every tensor starts at a multiple of and consists of.
int vector_bytes(const PackKvParams& params) {
  const std::int64_t element = params.element_bytes;
  std::uint64_t bits = static_cast<std::uint64_t>(params.head_dim * element) | 16;
  for (const void* base :
       {params.k, params.v, static_cast<const void*>(params.k_packed), static_cast<const void*>(params.v_packed)}) {
    bits |= reinterpret_cast<std::uintptr_t>(base);
  }
  for (const std::int64_t* strides :
       {params.k_stride, params.v_stride, params.k_packed_stride, params.v_packed_stride}) {
    for (int d = 0; d < 3; ++d) {
      bits |= static_cast<std::uint64_t>(strides[d] * element);
    }
  }
  return 1 << std::countr_zero(bits);
}

template <typename Vector>
cudaError_t launch(PackKvParams params, cudaStream_t stream) {
  // From here on strides count Vectors.
  for (std::int64_t* strides : {params.k_stride, params.v_stride, params.k_packed_stride, params.v_packed_stride}) {
    for (int d = 0; d < 3; ++d) {
      strides[d] = strides[d] * params.element_bytes / static_cast<std::int64_t>(sizeof(Vector));
    }
  }
  const auto row_vectors =
      static_cast<int>(params.head_dim * params.element_bytes / static_cast<std::int64_t>(sizeof(Vector)));
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::min(row_vectors, kWarpThreads))));
  const std::int64_t tile_rows = kThreads / lanes * kRowsInFlight;
  const std::int64_t max_rows = std::min(params.capacity, params.tokens + params.tail - 1);
  const std::int64_t tiles = std::min(ceil_div(max_rows, tile_rows), kMaxGrid);
  const std::int64_t batch_blocks = std::min(params.batch, kMaxGrid);
  const std::int64_t max_blocks = std::int64_t{params.num_sms} * kBlocksPerSm * kWaves;
  const std::int64_t blocks = std::clamp<std::int64_t>(max_blocks / (batch_blocks * params.heads), 1, tiles);

  const dim3 grid(static_cast<unsigned>(params.heads), static_cast<unsigned>(blocks),
                  static_cast<unsigned>(batch_blocks));
  return launch_dependent(pack_kv_kernel<Vector>, grid, kThreads, 0, stream, params, lanes, row_vectors);
}

}  // namespace

cudaError_t launch_pack_kv(const PackKvParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.heads == 0 || params.tokens == 0 || params.capacity == 0) {
    return cudaSuccess;
  }
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
