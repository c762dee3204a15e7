#pragma once

#include <cuda.h>

#include "cuda/common/tensor_map.h"
#include "cuda/ptx/barrier.cuh"

namespace zipvl::cuda::ptx {

// A tensor map holds the view itself (hopper_host.h).
inline void tma_prefetch(const CUtensorMap* /*map*/) {}

constexpr int kElementBytes = 2, kPieceBytes = 16;

// f(row of the tile, the same in its plane, plane) of every row of a box.
template <typename F>
void for_rows(const TensorMapView& view, const F& f) {
  for (int plane = 0; plane < static_cast<int>(view.box[2]); ++plane) {
    for (int row = 0; row < static_cast<int>(view.box[1]); ++row) {
      f(plane * static_cast<int>(view.box[1]) + row, row, plane);
    }
  }
}

inline bool is_inside(const TensorMapView& view, std::int64_t row, std::int64_t plane) {
  return row >= 0 && row < static_cast<std::int64_t>(view.size[1]) && plane >= 0 &&
         plane < static_cast<std::int64_t>(view.size[2]);
}

inline void tma_load_4d(void* target, const CUtensorMap* map, std::uint64_t* barrier, int x, int y, int z, int w) {
  if (reinterpret_cast<std::uintptr_t>(target) % 1024 != 0) {
    emulated::fail("a tile is not aligned to its swizzle");
  }
  TensorMapView view;
  std::memcpy(&view, map, sizeof view);
  emulated::Block::current_block->start_event([=] {
    const int row_bytes = static_cast<int>(view.box[0]) * kElementBytes;
    for_rows(view, [&](int r, int row, int plane) {
      unsigned char data[128] = {};
      const std::int64_t there = static_cast<std::int64_t>(view.size[0]) - x;
      if (is_inside(view, y + row, z + plane) && there > 0) {
        const std::int64_t at = x + (y + row) * view.stride[0] + (z + plane) * view.stride[1] + w * view.stride[2];
        std::memcpy(data, static_cast<const unsigned char*>(view.data) + at * kElementBytes,
                    std::min<std::int64_t>(there * kElementBytes, row_bytes));
      }
      for (int piece = 0; piece < row_bytes / kPieceBytes; ++piece) {
        std::memcpy(static_cast<unsigned char*>(target) + r * 128 + (piece ^ r % 8) * kPieceBytes,
                    data + piece * kPieceBytes, kPieceBytes);
      }
    });
    advance(barrier, 0, static_cast<std::int64_t>(view.box[1]) * view.box[2] * row_bytes);
  });
}

inline void tma_store_4d(const CUtensorMap* map, const void* source, int x, int y, int z, int w) {
  if (reinterpret_cast<std::uintptr_t>(source) % 1024 != 0) {
    emulated::fail("a tile is not aligned to its swizzle");
  }
  TensorMapView view;
  std::memcpy(&view, map, sizeof view);
  auto* data = static_cast<unsigned char*>(const_cast<void*>(view.data));
  for_rows(view, [&](int r, int row, int plane) {
    for (int piece = 0; piece < static_cast<int>(view.box[0]) * kElementBytes / kPieceBytes; ++piece) {
      const std::int64_t column = x + piece * kPieceBytes / kElementBytes;
      if (is_inside(view, y + row, z + plane) && column < static_cast<std::int64_t>(view.size[0])) {
        const std::int64_t at = column + (y + row) * view.stride[0] + (z + plane) * view.stride[1] + w * view.stride[2];
        emulated::Block::current_block->start_store(
            data + at * kElementBytes,
            static_cast<const unsigned char*>(source) + r * 128 + (piece ^ r % 8) * kPieceBytes, kPieceBytes);
      }
    }
  });
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
