#pragma once

#include "cuda_on_cpu.h"

namespace zipvl::cuda::ptx {

inline void named_barrier_sync(int id, int threads) { emulated::Block::current_block->synchronize_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulated::Block::current_block->arrive_named(id, threads); }
template <int Registers>
void warpgroup_reg_alloc() {}
template <int Registers>
void warpgroup_reg_dealloc() {}

// Kernels run one after the other.
inline void wait_on_dependent_grids() {}
inline void launch_dependent_grids() {}

}  // namespace zipvl::cuda::ptx
