// Tiles and shared memory of the two passes on Hopper. Both have one shape: a block holds on to 256 rows of one operand
// (probe rows in the first pass, keys in the second), 64 a warpgroup, while tiles of the other stream past. 256 rows
// rather than 128 halve what comes from L2, which at 128 would be the limit.
#pragma once

#include <cstdint>

#include "cuda/common/pipeline.cuh"
#include "cuda/common/smem_layout.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/probe_scores/probes.cuh"
#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::probe_scores::sm90 {

static_assert(kUnitRows == 64, "a warpgroup's rows: M of its products");

// The block's dynamic shared memory from the first multiple of 1,024 bytes on, as the swizzle asks for.
template <typename Storage>
__device__ __forceinline__ Storage& aligned_shared() {
  extern __shared__ unsigned char shared_bytes[];
  // By an offset: an address made from an integer would no longer be known to be shared memory's.
  const std::uint32_t offset = (1024 - ptx::shared_address(shared_bytes) % 1024) % 1024;
  return *reinterpret_cast<Storage*>(shared_bytes + offset);
}

template <typename ElementType, int HeadDim>
struct Traits {
  using Element = ElementType;
  static constexpr int kHeadDim = HeadDim;
  // Four warpgroups: while some wait for their products, others' exponentials keep the special function units busy; at
  // D 128 both units need 512 cycles for a warpgroup's 64 x 128 scores. Registers: 96 a thread, of which those take 64.
  static constexpr int kConsumers = 4;
  static constexpr int kBlockRows = kUnitRows * kConsumers;
  static constexpr int kThreads = kConsumers * kWarpgroupThreads + kWarpThreads;  // the last warp loads
  static constexpr int kStreamRows = HeadDim == 256 ? 64 : 128;
  // As many as 227 KiB hold beside the 256 rows: 128 KiB of them at D 256, 64 at D 128 and 96.
  static constexpr int kStages = HeadDim == 256 ? 3 : HeadDim == 64 ? 8 : 4;
  using Held = Sw128Slabs<kUnitRows, HeadDim>;  // of one warpgroup
  using Stream = Sw128Slabs<kStreamRows, HeadDim>;
};

template <typename Traits>
struct SharedStorage {
  alignas(1024) typename Traits::Element held[Traits::kConsumers][Traits::Held::kElements];
  alignas(1024) typename Traits::Element stream[Traits::kStages][Traits::Stream::kElements];
  alignas(16) float lse[Traits::kStages][Traits::kStreamRows];           // second pass: of the tile's rows
  alignas(16) std::int32_t limit[Traits::kStages][Traits::kStreamRows];  // likewise
  std::uint64_t full[Traits::kStages], empty[Traits::kStages];
  std::uint64_t held_full[Traits::kConsumers];
};

// Work items of a persistent block, in waves of one item a block. A block's place moves from wave to wave: items differ
// in length by their place, and so no block gets the long ones every time.
class TileScheduler {
 public:
  __device__ __forceinline__ explicit TileScheduler(int items) : place_(static_cast<int>(blockIdx.x)), items_(items) {
    skip_missing();
  }
  __device__ __forceinline__ bool valid() const { return wave_start_ < items_; }
  __device__ __forceinline__ int item() const { return wave_start_ + place_; }
  __device__ __forceinline__ void next() {
    step();
    skip_missing();
  }

 private:
  static constexpr int kStride = 37;  // odd: neighbours that repeat every 2, 4 or 8 items change places

  __device__ __forceinline__ void step() {
    wave_start_ += static_cast<int>(gridDim.x);
    place_ = (place_ + kStride) % static_cast<int>(gridDim.x);
  }
  // The last wave may be short.
  __device__ __forceinline__ void skip_missing() {
    if (valid() && item() >= items_) {
      step();
    }
  }

  int wave_start_ = 0, place_, items_;
};

}  // namespace zipvl::cuda::probe_scores::sm90
