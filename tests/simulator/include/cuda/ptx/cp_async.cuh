#pragma once

#include "cuda/ptx/scalar.cuh"

namespace zipvl::cuda::ptx {

inline void cp_async_16(std::uint32_t target, const void* source, bool valid) {
  emulated::Block::current_block->start_copy(shared_pointer(target), valid ? source : nullptr, 16);
}
inline void cp_async_16(std::uint32_t target, const void* source) { cp_async_16(target, source, true); }
inline void cp_async_4(std::uint32_t target, const void* source) {
  emulated::Block::current_block->start_copy(shared_pointer(target), source, 4);
}
inline void cp_async_commit() { emulated::Block::current_block->commit_copies(); }
template <int Pending>
void cp_async_wait() {
  emulated::Block::current_block->finish_copies(Pending);
}

}  // namespace zipvl::cuda::ptx
