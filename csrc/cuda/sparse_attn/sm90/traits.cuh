// Tiles, pipelines and shared memory of the Hopper kernel, for one element type and head dimension.
#pragma once

#include <cstdint>

#include "cuda/common/pipeline.cuh"
#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/plan.h"

namespace zipvl::cuda::sparse_attn::sm90 {

constexpr int kZeroBytes = 4096;  // of shared zeros that the copy engine writes to rows outside the selection
constexpr int kMaxBatches = plan::kSparseAttnMaxBatches;  // batch rows in the scheduler's table
// Packed K and V that the tiles running side by side may read: most of the H100's 50 MB of L2, less what queries and
// outputs pass through it.
constexpr std::int64_t kL2Bytes = std::int64_t{32} << 20;

// Ranged: rows see what RowRanges says of a list of keys. Otherwise they see the selection up to themselves.
template <typename ElementType, int HeadDim, bool Ranged>
struct Traits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
  static constexpr bool kRanged = Ranged;
  // Each consumer warpgroup owns 64 query rows. Two of them at 232 registers hold the scores, the weights and the
  // output of a 64 x 128 tile at D 128 (160 registers) and the queries; with three there are 160 registers each, which
  // is enough at D 64 (128) only, and there not for what ranged attention keeps.
  static constexpr int kConsumers = HeadDim == 64 && !kRanged ? 3 : 2;
  static constexpr int kBlockM = 64 * kConsumers;
  // At D 256 the output takes 128 registers and two stages of 128 keys would take 256 KiB.
  static constexpr int kBlockN = HeadDim == 256 ? 64 : 128;
  // Of K and of V. The first key block of a tile stands in stage 0, the next in stage 1 and so on: then the consumers'
  // loop, unrolled twice, knows its operands' addresses when it is compiled.
  static constexpr int kStages = 2;
  static constexpr int kQueryStages = HeadDim == 256 ? 1 : 2;  // the next tile's queries load during this one
  static constexpr int kThreads = kWarpgroupThreads * (kConsumers + 1);
  // Where there are registers for it a warpgroup keeps its queries as A operands (32 at D 128): a fifth less is read
  // from shared memory in a step (64 KiB of 80).
  static constexpr bool kQueriesInRegisters = HeadDim == 96 || HeadDim == 128;
  // setmaxnreg: 40 + 2 * 232 = 504, what 384 threads at 168 registers were launched with; 32 + 3 * 160 = 512, 512
  // threads at 128.
  static constexpr bool kWideProducer = kRanged && HeadDim == 256;  // 56 + 2 * 224: with less it spills
  static constexpr int kProducerRegisters = kWideProducer ? 56 : kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kWideProducer ? 224 : kConsumers == 3 ? 160 : 232;

  using Queries = Sw128Slabs<kBlockM, HeadDim>;
  using Keys = Sw128Slabs<kBlockN, HeadDim>;  // and values
};

// Warps of the producer warpgroup.
enum class ProducerWarp { kKeysValues = 0, kQueries0 = 1, kQueries1 = 2, kZeros = 3 };
constexpr int kQueryWarps = 2;

// Named barriers; 0 is __syncthreads. One a consumer warpgroup: its turn to issue products.
enum class NamedBarrier { kTurn0 = 1 };

// The order of the tiles, made once a block (scheduler.cuh).
struct TileTable {
  int batches;                  // with at least one tile
  int blocks[kMaxBatches];      // query blocks of those batch rows, descending
  int batch[kMaxBatches];       // which batch row
  int section_heads;            // key/value heads whose tiles run together, so that their K and V stay in L2
  int before[kMaxBatches + 1];  // (block, batch) pairs before the levels that k + 1 batch rows share; last: all
};

// Facts about its two rows that a consumer thread needs before and after the loop over the keys, but seldom in it.
template <bool Ranged>
struct RowPlaces {
  std::int64_t output[2];  // element of the output where the row begins; -1: it is none of the output's
  int limit[2];            // packed keys the row sees
};
template <>
struct RowPlaces<true> {
  int row[2];              // of the output [batch * queries, query_heads, head_dim]; -1: it is none of the output's
  int first[2], limit[2];  // the row sees keys [first, limit), counted from the tile's first block
  int sinks[2];            // and so many sinks
};

struct Tile {
  int batch, head, block;
};

constexpr int kSinkRows = 16;  // sinks of one product: its depth in the second one

template <typename Traits>
struct SinkStorage {
  using Layout = Sw128Slabs<kSinkRows, Traits::kHeadDim>;
  alignas(1024) typename Traits::Element k[Layout::kElements];
  alignas(1024) typename Traits::Element v[Layout::kElements];
  std::uint64_t full, empty;
};

// Ranged attention's part of a block's shared memory. The warps that load queries say what the rows of the next
// tile see while this one is computed: nobody else waits for device memory.
template <typename Traits, bool Ranged = Traits::kRanged>
struct RangedStorage {};
template <typename Traits>
struct RangedStorage<Traits, true> {
  SinkStorage<Traits> sinks;
  alignas(16) int4 group[Traits::kQueryStages][Traits::kBlockM / kRowGroup];  // RowRanges::group of the tile
  Tile tile[Traits::kQueryStages];                                            // batch -1: there are no more
  int2 range[Traits::kQueryStages][Traits::kBlockM];
  int row[Traits::kQueryStages][Traits::kBlockM];  // RowPlaces::row
  std::uint64_t rows_full[Traits::kQueryStages], rows_empty[Traits::kQueryStages];
};

template <typename Traits>
struct SharedStorage {
  alignas(1024) typename Traits::Element q[Traits::kQueryStages][Traits::Queries::kElements];
  alignas(1024) typename Traits::Element k[Traits::kStages][Traits::Keys::kElements];
  alignas(1024) typename Traits::Element v[Traits::kStages][Traits::Keys::kElements];
  alignas(128) unsigned char zeros[Traits::kRanged ? 16 : kZeroBytes];
  std::uint64_t q_full[Traits::kQueryStages], q_empty[Traits::kQueryStages];
  std::uint64_t k_full[Traits::kStages], k_empty[Traits::kStages];
  std::uint64_t v_full[Traits::kStages], v_empty[Traits::kStages];
  RowPlaces<Traits::kRanged> rows[Traits::kConsumers * kWarpgroupThreads];  // of each consumer thread, for itself
  TileTable table;
  RangedStorage<Traits> ranged;
};

// The parities to wait for, a bit a stage, where stages are not taken in turn for ever: each tile begins at stage 0.
struct StageParity {
  std::uint32_t bits = 0;

  __device__ __forceinline__ std::uint32_t of(int stage) const { return bits >> stage & 1; }
  __device__ __forceinline__ void flip(int stage) { bits ^= 1U << stage; }
};

}  // namespace zipvl::cuda::sparse_attn::sm90
