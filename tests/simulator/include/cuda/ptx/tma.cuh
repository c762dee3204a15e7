#pragma once

#include <cuda.h>

#include "cuda/common/tensor_map.h"
#include "cuda/ptx/barrier.cuh"

namespace zipvl::cuda::ptx {

// A tensor map holds the view itself (hopper_host.h).
inline void tma_prefetch(const CUtensorMap* /*map*/) {}

inline void tma_load_4d(void* target, const CUtensorMap* map, std::uint64_t* barrier, int x, int y, int z, int w) {
  if (reinterpret_cast<std::uintptr_t>(target) % 1024 != 0) {
    emulated::fail("a tile is not aligned to its swizzle");
  }
  TensorMapView view;
  std::memcpy(&view, map, sizeof view);
  emulated::Block::current_block->start_event([=] {
    constexpr int kElement = 2, kPiece = 16;  // bytes
    const int row_bytes = static_cast<int>(view.box[0]) * kElement;
    for (int r = 0; r < static_cast<int>(view.box[1]); ++r) {
      unsigned char row[128] = {};
      const std::int64_t there = static_cast<std::int64_t>(view.size[0]) - x;
      if (y + r >= 0 && y + r < static_cast<std::int64_t>(view.size[1]) && there > 0) {
        const auto* source = static_cast<const unsigned char*>(view.data) +
                             (x + (y + r) * view.stride[0] + z * view.stride[1] + w * view.stride[2]) * kElement;
        std::memcpy(row, source, std::min<std::int64_t>(there * kElement, row_bytes));
      }
      for (int piece = 0; piece < row_bytes / kPiece; ++piece) {
        std::memcpy(static_cast<unsigned char*>(target) + r * 128 + (piece ^ r % 8) * kPiece, row + piece * kPiece,
                    kPiece);
      }
    }
    advance(barrier, 0, static_cast<std::int64_t>(view.box[1]) * row_bytes);
  });
}

inline void tma_store_4d(const CUtensorMap* map, const void* source, int x, int y, int z, int w) {
  if (reinterpret_cast<std::uintptr_t>(source) % 1024 != 0) {
    emulated::fail("a tile is not aligned to its swizzle");
  }
  TensorMapView view;
  std::memcpy(&view, map, sizeof view);
  constexpr int kElement = 2, kPiece = 16;  // bytes
  auto* data = static_cast<unsigned char*>(const_cast<void*>(view.data));
  for (int r = 0; r < static_cast<int>(view.box[1]); ++r) {
    for (int piece = 0; piece < static_cast<int>(view.box[0]) * kElement / kPiece; ++piece) {
      const std::int64_t column = x + piece * kPiece / kElement;
      if (y + r < static_cast<std::int64_t>(view.size[1]) && column < static_cast<std::int64_t>(view.size[0])) {
        emulated::Block::current_block->start_store(
            data + (column + (y + r) * view.stride[0] + z * view.stride[1] + w * view.stride[2]) * kElement,
            static_cast<const unsigned char*>(source) + r * 128 + (piece ^ r % 8) * kPiece, kPiece);
      }
    }
  }
}

inline void check_bulk(const void* target, const void* source, std::uint32_t bytes) {
  if ((reinterpret_cast<std::uintptr_t>(target) | reinterpret_cast<std::uintptr_t>(source) | bytes) % 16 != 0) {
    emulated::fail("a bulk copy is not aligned to 16 bytes");
  }
}
inline void bulk_load(void* target, const void* source, std::uint32_t bytes, std::uint64_t* barrier) {
  check_bulk(target, source, bytes);
  emulated::Block::current_block->start_event([=] {
    std::memcpy(target, source, bytes);
    advance(barrier, 0, bytes);
  });
}
inline void bulk_store(void* target, const void* source, std::uint32_t bytes) {
  check_bulk(target, source, bytes);
  emulated::Block::current_block->start_store(target, source, static_cast<int>(bytes));
}
inline void tma_store_arrive() { emulated::Block::current_block->commit_stores(); }
template <int Pending>
void tma_store_wait() {
  emulated::Block::current_block->finish_stores(Pending);
}
inline void fence_view_async_shared() {}

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
