// A consumer warpgroup: 64 query rows of a tile against the packed keys. Products of the next score tile and of the
// last weights are under way together while the exponentials of neither's warpgroup wait (as FlashAttention-3 does,
// arXiv 2407.08608): the warpgroups take turns to issue, so that one's softmax runs under the other's products.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sparse_attn/sm90/softmax.cuh"
#include "cuda/sparse_attn/sm90/traits.cuh"

namespace zipvl::cuda::sm90 {

template <typename Traits>
class Consumer {
  using Element = typename Traits::Element;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kScores = kBlockN / 2;            // a thread's of a score tile
  static constexpr int kOutputs = Traits::kHeadDim / 2;  // a thread's of the output tile
  static constexpr int kStepsPerSlab = kSlabColumns / 16;

 public:
  __device__ __forceinline__ Consumer(SharedStorage<Traits>& shared, float scale_log2, int warpgroup)
      : shared_(shared), scale_log2_(scale_log2), warpgroup_(warpgroup) {}

  // Output [64, D] of this warpgroup's rows, not yet divided by the sums; `blocks` key blocks, all of them seen by
  // every row up to packed key `clear`.
  __device__ __forceinline__ void attend(float (&o)[kOutputs], RowState& rows, int blocks, int clear) {
    float s[kScores];
    std::uint32_t p[kScores / 8][4];
    float rescale[2];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      o[i] = 0.0F;
    }
    ptx::mbarrier_wait(&shared_.q_full[q_.stage], q_.parity);
    ptx::fence_async_shared();  // the queries came by cp.async, which the tensor cores' reads are not ordered with
    const std::uint64_t query = ptx::wgmma_descriptor(shared_.q[q_.stage] + warpgroup_ * 64 * kSlabColumns);
    int block = blocks - 1;
    ptx::mbarrier_wait(&shared_.k_full[k_.stage], k_.parity);
    ptx::wgmma_fence();
    issue_scores(s, query);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(s);
    release(shared_.k_empty, k_);
    weigh<true>(s, rows, rescale, scale_log2_, block * kBlockN);
    to_fragments<Element>(s, p);
    await_keys(block);
    for (--block; block >= 0 && (block + 1) * kBlockN > clear; --block) {
      step<true>(s, p, o, rows, query, block);
    }
    for (; block >= 0; --block) {
      step<false>(s, p, o, rows, query, block);
    }
    release(shared_.q_empty, q_);
    ptx::mbarrier_wait(&shared_.v_full[v_.stage], v_.parity);
    ptx::wgmma_fence_registers(o);
    ptx::wgmma_fence();
    issue_output(o, p);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(o);
    release(shared_.v_empty, v_);
  }

  // The queries of a tile without keys were loaded all the same.
  __device__ __forceinline__ void skip() {
    ptx::mbarrier_wait(&shared_.q_full[q_.stage], q_.parity);
    release(shared_.q_empty, q_);
  }

  // Before the first tile: the first warpgroup's turn.
  __device__ __forceinline__ void begin_turns() const {
    if (warpgroup_ == Traits::kConsumers - 1) {
      pass_turn();
    }
  }

 private:
  // Scores of `block` and, meanwhile, the output of the block before it.
  template <bool kMasked>
  __device__ __forceinline__ void step(float (&s)[kScores], std::uint32_t (&p)[kScores / 8][4], float (&o)[kOutputs],
                                       RowState& rows, std::uint64_t query, int block) {
    float rescale[2];
    ptx::named_barrier_sync(turn(warpgroup_), 2 * kWarpgroupThreads);
    ptx::wgmma_fence_registers(s);
    ptx::wgmma_fence_registers(o);
    ptx::wgmma_fence();
    issue_scores(s, query);
    ptx::wgmma_commit();
    ptx::mbarrier_wait(&shared_.v_full[v_.stage], v_.parity);
    ptx::wgmma_fence();
    issue_output(o, p);
    ptx::wgmma_commit();
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::wgmma_fence_registers(s);
    release(shared_.k_empty, k_);
    weigh<kMasked>(s, rows, rescale, scale_log2_, block * kBlockN);
    // The exponentials belong here, under the product of the weights before. Left in one basic block with the wait
    // below, the compiler sinks them behind it; waiting for the next keys first ends the block.
    ptx::wgmma_fence_registers(s);
    await_keys(block);
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(o);
    release(shared_.v_empty, v_);
    rescale_output(o, rescale);
    to_fragments<Element>(s, p);
  }

  // Waits for the keys before `block`, if there are any.
  __device__ __forceinline__ void await_keys(int block) const {
    if (block > 0) {
      ptx::mbarrier_wait(&shared_.k_full[k_.stage], k_.parity);
    }
  }

  __device__ __forceinline__ void issue_scores(float (&s)[kScores], std::uint64_t query) const {
    const std::uint64_t key = ptx::wgmma_descriptor(shared_.k[k_.stage]);
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const int slab = k / kStepsPerSlab, in_slab = (k % kStepsPerSlab) * 32;
      ptx::Wgmma<Element, kBlockN, false>::ss(s, ptx::wgmma_advance(query, slab * Traits::kBlockM * 128 + in_slab),
                                              ptx::wgmma_advance(key, slab * kBlockN * 128 + in_slab), k > 0);
    }
  }

  __device__ __forceinline__ void issue_output(float (&o)[kOutputs], const std::uint32_t (&p)[kScores / 8][4]) const {
    const std::uint64_t value = ptx::wgmma_descriptor(shared_.v[v_.stage], 1024, kBlockN * 128);
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      ptx::Wgmma<Element, Traits::kHeadDim, true>::rs(o, p[k], ptx::wgmma_advance(value, k * 16 * 128), 1);
    }
  }

  template <int Stages>
  __device__ __forceinline__ void release(std::uint64_t (&empty)[Stages], RingPlace<Stages>& place) const {
    if (threadIdx.x % kWarpThreads == 0) {
      ptx::mbarrier_arrive(&empty[place.stage]);
    }
    place.advance();
  }

  __device__ __forceinline__ static int turn(int warpgroup) {
    return static_cast<int>(NamedBarrier::kTurn0) + warpgroup;
  }

  __device__ __forceinline__ void pass_turn() const {
    ptx::named_barrier_arrive(turn((warpgroup_ + 1) % Traits::kConsumers), 2 * kWarpgroupThreads);
  }

  SharedStorage<Traits>& shared_;
  float scale_log2_;
  int warpgroup_;
  RingPlace<Traits::kQueryStages> q_;
  RingPlace<Traits::kStages> k_, v_;
};

}  // namespace zipvl::cuda::sm90
