// A consumer warpgroup: 64 query rows of a tile against the packed keys. Products of the next score tile and of the
// last weights are under way together, and no exponential waits for a product (as FlashAttention-3 does, arXiv
// 2407.08608): the warpgroups take turns to issue, so that one's softmax runs under the other's products.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sparse_attn/sm90/scheduler.cuh"
#include "cuda/sparse_attn/sm90/sinks.cuh"
#include "cuda/sparse_attn/sm90/softmax.cuh"
#include "cuda/sparse_attn/sm90/traits.cuh"

namespace zipvl::cuda::sparse_attn::sm90 {

template <typename Traits>
class Consumer {
  using Element = typename Traits::Element;
  using QueryLayout = typename Traits::Queries;
  using KeyLayout = typename Traits::Keys;  // and values
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kScores = kBlockN / 2;               // a thread's of a score tile
  static constexpr int kOutputs = Traits::kHeadDim / 2;     // a thread's of the output tile
  static constexpr int kFragments = Traits::kHeadDim / 16;  // steps of 16 along the head dimension

  struct Queries {
    std::uint32_t fragment[kFragments][4];  // kQueriesInRegisters
    std::uint64_t descriptor;               // otherwise
  };

 public:
  __device__ __forceinline__ Consumer(SharedStorage<Traits>& shared, float scale_log2, int warpgroup)
      : shared_(shared), scale_log2_(scale_log2), warpgroup_(warpgroup) {}

  // Output [64, D] of this warpgroup's rows, not yet divided by the sums; `blocks` key blocks, all of them seen by
  // every row from key `clear_first` up to key `clear`, and up to `sinks` sinks before them (kRanged).
  __device__ __forceinline__ void attend(float (&o)[kOutputs], RowState& rows, int blocks, int clear,
                                         [[maybe_unused]] int clear_first = 0, [[maybe_unused]] int sinks = 0) {
    float s[kScores];
    std::uint32_t p[kScores / 8][4];
    float rescale[2];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      o[i] = 0.0F;
    }
    ptx::mbarrier_wait(&shared_.q_full[q_.index], q_.phase);
    Queries query;
    if constexpr (Traits::kQueriesInRegisters) {
      load_fragments(query.fragment);
      release_queries();
    } else {
      ptx::fence_view_async_shared();  // they came by cp.async, which the tensor cores' reads are not ordered with
      query.descriptor = ptx::wgmma_descriptor(shared_.q[q_.index] + QueryLayout::row_elements(warpgroup_ * 64));
    }
    if constexpr (Traits::kRanged) {
      for (int sink = 0; sink < sinks; sink += kSinkRows) {
        attend_sinks<Traits>(o, rows, shared_.ranged.sinks, sinks_phase_, scale_log2_, places().sinks, sink,
                             [&](float (&scores)[kSinkRows / 2], std::uint64_t key, int k) {
                               if constexpr (Traits::kQueriesInRegisters) {
                                 ptx::Wgmma<Element, kSinkRows, false>::rs(scores, query.fragment[k], key, k > 0);
                               } else {
                                 ptx::Wgmma<Element, kSinkRows, false>::ss(
                                     scores, ptx::wgmma_advance(operand(query.descriptor), QueryLayout::column_step(k)),
                                     key, k > 0);
                               }
                             });
      }
    }
    int block = blocks - 1;
    ptx::mbarrier_wait(&shared_.k_full[0], k_parity_.of(0));
    ptx::warpgroup_arrive();
    issue_qk<0>(s, query);
    ptx::warpgroup_commit_batch();
    ptx::warpgroup_wait<0>();
    ptx::warpgroup_fence_operand(s);
    release(shared_.k_empty, 0, k_parity_);
    const bool arrived = next_arrived<0>(block);
    online_softmax<true>(s, rows, rescale, scale_log2_, limits(), block * kBlockN);
    if constexpr (Traits::kRanged) {
      if (sinks > 0) {
        rescale_o(o, rescale);
      }
    }
    to_fragments<Element>(s, p);
    await_next<0>(block, arrived);
    --block;
    bool odd = false;
    while (block >= 0 && (block + 1) * kBlockN > clear) {
      odd = two_steps<true>(s, p, o, rows, query, block);
    }
    if constexpr (Traits::kRanged) {
      while (block >= 0 && max(block - 1, 0) * kBlockN >= clear_first) {
        odd = two_steps<false>(s, p, o, rows, query, block);
      }
      while (block >= 0) {
        odd = two_steps<true>(s, p, o, rows, query, block);
      }
    } else {
      while (block >= 0) {
        odd = two_steps<false>(s, p, o, rows, query, block);
      }
    }
    if (odd) {
      finish<1>(o, p);
    } else {
      finish<0>(o, p);
    }
  }

  // This thread's, which it writes before attend.
  __device__ __forceinline__ RowPlaces<Traits::kRanged>& places() const {
    return shared_.rows[threadIdx.x - kWarpgroupThreads];
  }

  // The queries of a tile without keys were loaded all the same.
  __device__ __forceinline__ void skip() {
    ptx::mbarrier_wait(&shared_.q_full[q_.index], q_.phase);
    release_queries();
  }

  // Ranged attention: takes over what the rows of the next tile see, and says what there is to `attend`; batch -1:
  // there are no more tiles. row_of_thread: of the thread's first row in the tile.
  struct RangedTile {
    Tile tile;
    int blocks, clear_end, clear_first, sinks;
  };
  __device__ __forceinline__ RangedTile next_tile(const AttnParams& params, int row_of_thread) {
    RangedStorage<Traits>& from = shared_.ranged;
    ptx::mbarrier_wait(&from.rows_full[q_.index], q_.phase);
    const Tile tile = from.tile[q_.index];
    if (tile.batch < 0) {
      return {tile, 0, 0, 0, 0};
    }
    const TileBlocks blocks = tile_blocks<Traits>(params, [&](int i) { return from.group[q_.index][i]; });
    const int begin = blocks.first * kBlockN;
    RowPlaces<true>& own = places();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int2 range = from.range[q_.index][row_of_thread + 8 * i];
      own.first[i] = range.x - begin;
      own.limit[i] = range.y - begin;
      own.sinks[i] = min(range.x, params.ranges.num_sinks);
      own.row[i] = from.row[q_.index][row_of_thread + 8 * i];
    }
    const int4 low = from.group[q_.index][2 * warpgroup_], high = from.group[q_.index][2 * warpgroup_ + 1];
    ptx::mbarrier_arrive(&from.rows_empty[q_.index]);
    return {tile, blocks.end - blocks.first, min(low.w, high.w) - begin, max(low.z, high.z) - begin,
            blocks.sinks ? params.ranges.num_sinks : 0};
  }

  // Before the first tile: the first warpgroup's turn.
  __device__ __forceinline__ void begin_turns() const {
    if (warpgroup_ == Traits::kConsumers - 1) {
      pass_turn();
    }
  }

 private:
  // What the rows see.
  __device__ __forceinline__ RowLimits<Traits::kRanged> limits() const {
    if constexpr (Traits::kRanged) {
      return {places().first, places().limit};
    } else {
      return {places().limit};
    }
  }

  // Steps of `block` and the block before it, or of `block` alone where it is the first; says whether it was.
  template <bool kMasked>
  __device__ __forceinline__ bool two_steps(float (&s)[kScores], std::uint32_t (&p)[kScores / 8][4],
                                            float (&o)[kOutputs], RowState& rows, const Queries& query, int& block) {
    step<kMasked, 1>(s, p, o, rows, query, block);
    if (--block < 0) {
      return true;
    }
    step<kMasked, 0>(s, p, o, rows, query, block);
    --block;
    return false;
  }

  // Scores of `block`, whose keys stand in stage kStage, and meanwhile the output of the block before it, whose values
  // stand in the other one.
  template <bool kMasked, int kStage>
  __device__ __forceinline__ void step(float (&s)[kScores], std::uint32_t (&p)[kScores / 8][4], float (&o)[kOutputs],
                                       RowState& rows, const Queries& query, int block) {
    float rescale[2];
    if constexpr (Traits::kConsumers > 1) {
      ptx::named_barrier_sync(turn(warpgroup_), 2 * kWarpgroupThreads);
    }
    ptx::warpgroup_fence_operand(s);
    ptx::warpgroup_fence_operand(o);
    ptx::warpgroup_arrive();
    issue_qk<kStage>(s, query);
    ptx::warpgroup_commit_batch();
    ptx::warpgroup_arrive();
    issue_pv<kStage ^ 1>(o, p);
    ptx::warpgroup_commit_batch();
    pass_turn();
    ptx::warpgroup_wait<1>();
    ptx::warpgroup_fence_operand(s);
    release(shared_.k_empty, kStage, k_parity_);
    const bool arrived = next_arrived<kStage>(block);
    online_softmax<kMasked>(s, rows, rescale, scale_log2_, limits(), block * kBlockN);
    // The exponentials belong here, under the product of the weights before. Left in one basic block with the wait
    // below, the compiler sinks them behind it; waiting for what comes next ends the block.
    ptx::warpgroup_fence_operand(s);
    await_next<kStage>(block, arrived);
    ptx::warpgroup_wait<0>();
    ptx::warpgroup_fence_operand(o);
    release(shared_.v_empty, kStage ^ 1, v_parity_);
    rescale_o(o, rescale);
    to_fragments<Element>(s, p);
  }

  // The output of the last block, whose values stand in stage kStage.
  template <int kStage>
  __device__ __forceinline__ void finish(float (&o)[kOutputs], const std::uint32_t (&p)[kScores / 8][4]) {
    if constexpr (!Traits::kQueriesInRegisters) {
      release_queries();
    }
    ptx::warpgroup_fence_operand(o);
    ptx::warpgroup_arrive();
    issue_pv<kStage>(o, p);
    ptx::warpgroup_commit_batch();
    ptx::warpgroup_wait<0>();
    ptx::warpgroup_fence_operand(o);
    release(shared_.v_empty, kStage, v_parity_);
  }

  // What the next products read, `block` standing in stage kStage: its values, and the keys of the block after it, if
  // there is one. Asked before the exponentials and waited for after them, so that the answer costs no time.
  template <int kStage>
  __device__ __forceinline__ bool next_arrived(int block) const {
    const bool values = ptx::mbarrier_test_wait(&shared_.v_full[kStage], v_parity_.of(kStage));
    const bool keys = ptx::mbarrier_test_wait(&shared_.k_full[kStage ^ 1], k_parity_.of(kStage ^ 1));
    return values && (keys || block == 0);
  }

  template <int kStage>
  __device__ __forceinline__ void await_next(int block, bool arrived) const {
    if (!arrived) {
      if (block > 0) {
        ptx::mbarrier_wait(&shared_.k_full[kStage ^ 1], k_parity_.of(kStage ^ 1));
      }
      ptx::mbarrier_wait(&shared_.v_full[kStage], v_parity_.of(kStage));
    }
  }

  template <int kStage>
  __device__ __forceinline__ void issue_qk(float (&s)[kScores], const Queries& query) const {
    const std::uint64_t key = operand(ptx::wgmma_descriptor(shared_.k[kStage]));
#pragma unroll
    for (int k = 0; k < kFragments; ++k) {
      const std::uint64_t key_step = ptx::wgmma_advance(key, KeyLayout::column_step(k));
      if constexpr (Traits::kQueriesInRegisters) {
        ptx::Wgmma<Element, kBlockN, false>::rs(s, query.fragment[k], key_step, k > 0);
      } else {
        ptx::Wgmma<Element, kBlockN, false>::ss(
            s, ptx::wgmma_advance(operand(query.descriptor), QueryLayout::column_step(k)), key_step, k > 0);
      }
    }
  }

  template <int kStage>
  __device__ __forceinline__ void issue_pv(float (&o)[kOutputs], const std::uint32_t (&p)[kScores / 8][4]) const {
    const std::uint64_t value =
        operand(ptx::wgmma_descriptor(shared_.v[kStage], KeyLayout::kGroupBytes, KeyLayout::kSlabBytes));
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      ptx::Wgmma<Element, Traits::kHeadDim, true>::rs(o, p[k], ptx::wgmma_advance(value, KeyLayout::row_step(k)), 1);
    }
  }

  // Where registers are short (D 64 and 256), what is derived from a descriptor is made at its use: hoisted out of the
  // loop, the compiler would spill it.
  __device__ __forceinline__ static std::uint64_t operand(std::uint64_t descriptor) {
    return Traits::kQueriesInRegisters ? descriptor : ptx::opaque(descriptor);
  }

  // This warp's 16 query rows as A operands.
  __device__ __forceinline__ void load_fragments(std::uint32_t (&fragment)[kFragments][4]) const {
    const int lane = threadIdx.x % kWarpThreads;
    const int row = warpgroup_ * 64 + threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + lane % 16;
    const std::uint32_t begin = ptx::shared_address(shared_.q[q_.index]) + QueryLayout::row(row);
#pragma unroll
    for (int k = 0; k < kFragments; ++k) {
      const int piece = 2 * k + lane / 16;
      ptx::ldmatrix(fragment[k], begin + QueryLayout::slab_of(2 * k) + QueryLayout::in_row(row, piece));
    }
  }

  __device__ __forceinline__ static void arrive(std::uint64_t* barrier) {
    if (threadIdx.x % kWarpThreads == 0) {
      ptx::mbarrier_arrive(barrier);
    }
  }

  __device__ __forceinline__ void release(std::uint64_t* empty, int stage, StageParity& parity) const {
    arrive(&empty[stage]);
    parity.flip(stage);
  }

  __device__ __forceinline__ void release_queries() {
    arrive(&shared_.q_empty[q_.index]);
    q_.advance();
  }

  __device__ __forceinline__ static int turn(int warpgroup) {
    return static_cast<int>(NamedBarrier::kTurn0) + warpgroup;
  }

  __device__ __forceinline__ void pass_turn() const {
    if constexpr (Traits::kConsumers > 1) {
      ptx::named_barrier_arrive(turn((warpgroup_ + 1) % Traits::kConsumers), 2 * kWarpgroupThreads);
    }
  }

  SharedStorage<Traits>& shared_;
  float scale_log2_;
  int warpgroup_;
  PipelineState<Traits::kQueryStages> q_;
  StageParity k_parity_, v_parity_;
  std::uint32_t sinks_phase_ = 0;
};

}  // namespace zipvl::cuda::sparse_attn::sm90
