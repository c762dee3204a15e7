// The layouts of tiles in shared memory: rows of 16-bit elements, moved in pieces of 16 bytes. smem_layout.cpp proves
// each to be the CuTe layout that its comment names, or to have its property where CuTe has no name for it.
//
// They are arithmetic: CuTe's layouts called in a kernel give it other registers, and tests/simulator has no CuTe. Rows
// and pieces have functions of their own, because the order in which a kernel adds them up is part of its machine code.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace zipvl::cuda {

constexpr int kPieceElements = 8;  // what one cp.async copies, and a row of an ldmatrix
constexpr int kPieceBytes = 16;
constexpr int kSlabColumns = 64;  // one row of the 128-byte swizzle

// Operands of wgmma, which the copy engine (TMA) writes slab by slab: slabs of 64 columns one behind the other, each
// under the 128-byte swizzle. A tile and the parts of it that a product reads begin at multiples of 1024 bytes.
//   Operands along K: tile_to_shape(GMMA::Layout_K_SW128_Atom<T>, (Rows, Columns)).
//   Values, whose rows are the product's K: tile_to_shape(GMMA::Layout_MN_SW128_Atom<T>, (Columns, Rows), Step<2, 1>).
template <int Rows, int Columns>
struct Sw128Slabs {
  static constexpr int kSlabs = ceil_div(Columns, kSlabColumns);
  static constexpr int kRowBytes = kSlabColumns * 2;  // of a slab
  static constexpr int kGroupBytes = 8 * kRowBytes;   // eight rows, which the swizzle permutes alike
  static constexpr int kSlabElements = Rows * kSlabColumns;
  static constexpr int kSlabBytes = Rows * kRowBytes;
  static constexpr int kPieces = kSlabs * 8;  // of a row, over all slabs
  static constexpr int kElements = kSlabs * kSlabElements;
  static constexpr int kBytes = kSlabs * kSlabBytes;

  // Where a piece of a row is: its slab's bytes from the tile, the row's in the slab and the piece's in that.
  ZIPVL_HOST_DEVICE static constexpr int slab_of(int piece) { return piece / 8 * kSlabBytes; }
  ZIPVL_HOST_DEVICE static constexpr int row(int row) { return row * kRowBytes; }
  ZIPVL_HOST_DEVICE static constexpr int in_row(int row, int piece) { return (piece % 8 ^ row % 8) * kPieceBytes; }

  // The same of a row and its piece in elements.
  ZIPVL_HOST_DEVICE static constexpr int row_elements(int row) { return row * kSlabColumns; }
  ZIPVL_HOST_DEVICE static constexpr int in_row_elements(int row, int piece) {
    return (piece % 8 ^ row % 8) * kPieceElements;
  }

  // Bytes by which a descriptor moves to step `k`, 16 deep, of a product along the columns, or along the rows.
  ZIPVL_HOST_DEVICE static constexpr int column_step(int k) { return k / 4 * kSlabBytes + k % 4 * 32; }
  ZIPVL_HOST_DEVICE static constexpr int row_step(int k) { return k * 16 * kRowBytes; }
};

// Operands of mma.sync: whole rows one behind the other, pieces permuted within a row by its number, so that the eight
// rows of an ldmatrix fall on different banks. Row r + 8 is permuted as row r.
//   Columns 64, 128, 256: composition(Swizzle<3, 3, 3 | 4 | 5>, Layout<(Rows, Columns), (Columns, 1)>).
//   Columns 96: no Swizzle of the offset, as its bits hold no row number by themselves; even and odd rows of 192 bytes
//   fall on different halves of the banks already, and four pieces change places by the number of the pair of rows.
template <int Columns>
struct SwizzledRows {
  static constexpr int kRowBytes = Columns * 2;
  static constexpr int kPieces = Columns / kPieceElements;
  static constexpr int kPeriodPieces = Columns % 64 == 0 ? 8 : 4;  // that change places among themselves
  static constexpr int kPeriodBytes = kPeriodPieces * kPieceBytes;
  static_assert(kPieces % kPeriodPieces == 0);

  ZIPVL_HOST_DEVICE static constexpr int swizzle(int row) { return kPeriodPieces == 8 ? row % 8 : row / 2 % 4; }

  // Where a piece of a row is: the row's bytes from the tile and the piece's in the row; both together.
  ZIPVL_HOST_DEVICE static constexpr int row(int row) { return row * kRowBytes; }
  ZIPVL_HOST_DEVICE static constexpr int in_row(int row, int piece) { return (piece ^ swizzle(row)) * kPieceBytes; }
  ZIPVL_HOST_DEVICE static constexpr int offset(int row, int piece) {
    // One sum in two forms: each leaves the kernels of its head dims their machine code.
    if constexpr (kPeriodPieces == 8) {
      return row * kRowBytes + (piece ^ swizzle(row)) * kPieceBytes;
    } else {
      const int permuted = piece ^ row / 2 % 4;
      return row * kRowBytes + permuted * kPieceBytes;
    }
  }

  // Where piece 2 * step + c of a row is, given where its piece c is (0 or 1); tiles begin at multiples of
  // kPeriodBytes.
  ZIPVL_HOST_DEVICE static constexpr std::uint32_t advance(std::uint32_t first, int step) {
    constexpr int kPeriodSteps = kPeriodPieces / 2, kStepBytes = 2 * kPieceBytes;
    return (first ^ static_cast<std::uint32_t>(step % kPeriodSteps * kStepBytes)) +
           static_cast<std::uint32_t>(step / kPeriodSteps * kPeriodBytes);
  }
};

// Rows that are a piece longer than their columns, for the few that are read once: the eight rows of an ldmatrix fall
// on different banks without a swizzle. Layout<(Rows, Columns), (Columns + 8, 1)>.
template <int Columns>
struct PaddedRows {
  static constexpr int kRowBytes = Columns * 2 + kPieceBytes;
  static constexpr int kPieces = Columns / kPieceElements;

  // Where a piece of a row is: the row's bytes from the tile and the piece's in the row.
  ZIPVL_HOST_DEVICE static constexpr int row(int row) { return row * kRowBytes; }
  ZIPVL_HOST_DEVICE static constexpr int in_row(int piece) { return piece * kPieceBytes; }
};

}  // namespace zipvl::cuda
