#pragma once

#include "cuda_on_cpu.h"

namespace zipvl::cuda::ptx {

inline void named_barrier_sync(int id, int threads) { emulated::Block::current_block->synchronize_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulated::Block::current_block->arrive_named(id, threads); }
template <int Registers>
void grow_registers() {}
template <int Registers>
void shrink_registers() {}

// Kernels run one after the other.
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace zipvl::cuda::ptx
