#pragma once

#include "cuda/ptx/mbarrier.cuh"

namespace zipvl::cuda::ptx {

inline std::uint32_t cluster_rank() { return static_cast<std::uint32_t>(emulated::Block::current_block->rank()); }
inline std::uint32_t cluster_size() {
  return static_cast<std::uint32_t>(emulated::Block::current_block->cluster_size());
}
inline void cluster_arrive() { emulated::Block::current_block->arrive_cluster(); }
inline void cluster_wait() { emulated::Block::current_block->wait_cluster(); }

// The block in the highest bits, the offset in the others.
constexpr int kOffsetBits = 24;

inline std::uint32_t shared_address_in(const void* pointer, std::uint32_t rank) {
  const auto offset = static_cast<std::int32_t>(shared_address(pointer));
  if (offset != offset << (32 - kOffsetBits) >> (32 - kOffsetBits)) {
    emulated::fail("shared memory is larger than an address here");
  }
  return rank << kOffsetBits | (static_cast<std::uint32_t>(offset) & ((1U << kOffsetBits) - 1U));
}
inline unsigned char* pointer_in_cluster(std::uint32_t address) {
  const std::int32_t offset = static_cast<std::int32_t>(address << (32 - kOffsetBits)) >> (32 - kOffsetBits);
  return emulated::Block::current_block->in_block(static_cast<int>(address >> kOffsetBits), offset);
}

// Bytes on their way to another block: there at once or later, like all copies.
inline void send(std::uint32_t target, const std::function<void(unsigned char*)>& put, std::uint32_t bytes,
                 std::uint32_t barrier) {
  emulated::Block::current_block->start_event([=] {
    put(pointer_in_cluster(target));
    advance(reinterpret_cast<std::uint64_t*>(pointer_in_cluster(barrier)), 0, bytes);
  });
}
template <typename T>
void store_async(std::uint32_t target, const T& value, std::uint32_t barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  send(target, [value](unsigned char* to) { std::memcpy(to, &value, sizeof value); }, sizeof value, barrier);
}
inline void bulk_copy_to_block(std::uint32_t target, const void* source, std::uint32_t bytes, std::uint32_t barrier) {
  if ((target | reinterpret_cast<std::uintptr_t>(source) | bytes) % 16 != 0) {
    emulated::fail("a bulk copy is not aligned to 16 bytes");
  }
  send(target, [source, bytes](unsigned char* to) { std::memcpy(to, source, bytes); }, bytes, barrier);
}

}  // namespace zipvl::cuda::ptx
