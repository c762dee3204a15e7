#pragma once

#include "cuda_on_cpu.h"

namespace zipvl::cuda::ptx {

inline void named_barrier_sync(int id, int threads) { emulated::Block::current_block->barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulated::Block::current_block->barrier(id, threads, false); }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace zipvl::cuda::ptx
