// Proves, when it is compiled, that the layouts of smem_layout.cuh are the CuTe layouts that their comments name, and
// that ldmatrix reads them without bank conflicts. It holds no code that runs.
#include "cuda/common/smem_layout.cuh"

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/layout.hpp>
#include <cute/swizzle_layout.hpp>

namespace zipvl::cuda {
namespace {

using cute::_1, cute::_2;
using cute::Int, cute::Layout, cute::Shape, cute::Stride;
namespace GMMA = cute::SM90::GMMA;

constexpr int kElementBytes = 2;
constexpr int kRows = 16;  // twice the eight after which the swizzles repeat

// Whether of(row, piece), in bytes, is where `layout` of 16-bit elements has that piece: its first element and its
// last.
template <typename CuteLayout, typename Offset>
constexpr bool same(const CuteLayout& layout, int pieces, const Offset& of) {
  for (int row = 0; row < kRows; ++row) {
    for (int piece = 0; piece < pieces; ++piece) {
      const int first = piece * kPieceElements, last = first + kPieceElements - 1;
      if (static_cast<int>(layout(row, first)) * kElementBytes != of(row, piece) ||
          static_cast<int>(layout(row, last)) * kElementBytes != of(row, piece) + kPieceBytes - kElementBytes) {
        return false;
      }
    }
  }
  return true;
}

// ---- Sw128Slabs

template <int Rows, int Columns>
using AlongK = decltype(cute::as_position_independent_swizzle_layout(
    cute::tile_to_shape(GMMA::Layout_K_SW128_Atom<cute::half_t>{}, Shape<Int<Rows>, Int<Columns>>{})));
template <int Rows, int Columns>
using AlongMN = decltype(cute::as_position_independent_swizzle_layout(cute::tile_to_shape(
    GMMA::Layout_MN_SW128_Atom<cute::half_t>{}, Shape<Int<Columns>, Int<Rows>>{}, cute::Step<_2, _1>{})));

template <int Rows, int Columns>
constexpr bool slabs_are_gmma() {
  using Slabs = Sw128Slabs<Rows, Columns>;
  constexpr int kColumns = Slabs::kSlabs * kSlabColumns;  // those of the tile, the last slab whole
  constexpr AlongK<Rows, kColumns> along_k{};
  constexpr AlongMN<Rows, kColumns> along_mn{};
  const auto offset = [](int row, int piece) {
    return Slabs::slab_of(piece) + Slabs::row(row) + Slabs::in_row(row, piece);
  };
  const auto by_elements = [](int row, int piece) {
    return Slabs::slab_of(piece) + (Slabs::row_elements(row) + Slabs::in_row_elements(row, piece)) * kElementBytes;
  };
  bool right = same(along_k, Slabs::kPieces, offset) && same(along_k, Slabs::kPieces, by_elements) &&
               same([&](int row, int column) { return along_mn(column, row); }, Slabs::kPieces, offset);
  for (int row = 0; row < Rows; row += 8) {  // the rows that `same` leaves out
    right = right && static_cast<int>(along_k(row, 0)) == Slabs::row_elements(row) &&
            static_cast<int>(along_mn(0, row)) == Slabs::row_elements(row);
  }
  for (int k = 0; k < kColumns / 16; ++k) {
    right = right && static_cast<int>(along_k(0, 16 * k)) * kElementBytes == Slabs::column_step(k);
  }
  for (int k = 0; k < Rows / 16; ++k) {
    right = right && static_cast<int>(along_mn(0, 16 * k)) * kElementBytes == Slabs::row_step(k);
  }
  return right && Slabs::kElements == static_cast<int>(cute::cosize_v<AlongK<Rows, kColumns>>) &&
         Slabs::kGroupBytes == static_cast<int>(along_k(8, 0)) * kElementBytes;
}
static_assert(slabs_are_gmma<192, 64>() && slabs_are_gmma<128, 96>() && slabs_are_gmma<64, 256>());

// ---- SwizzledRows, PaddedRows

// Whether eight rows of an ldmatrix, at any piece of pieces, fall on different banks: 128 bytes are all of them.
template <typename Offset>
constexpr bool without_bank_conflicts(int pieces, const Offset& of) {
  for (int first = 0; first < kRows; first += 8) {
    for (int piece = 0; piece < pieces; ++piece) {
      unsigned places = 0;
      for (int row = first; row < first + 8; ++row) {
        places |= 1U << (of(row, piece) / kPieceBytes % 8);
      }
      if (places != 0xFF) {
        return false;
      }
    }
  }
  return true;
}

// Whether every piece has a place of its own among its row's, and is found from the row's first two.
template <int Columns>
constexpr bool permutes_rows() {
  using Rows = SwizzledRows<Columns>;
  for (int row = 0; row < kRows; ++row) {
    unsigned places = 0;  // at most 32
    for (int piece = 0; piece < Rows::kPieces; ++piece) {
      const int offset = Rows::offset(row, piece), place = Rows::in_row(row, piece) / kPieceBytes;
      const auto first = static_cast<std::uint32_t>(Rows::offset(row, piece % 2));
      if (place < 0 || place >= Rows::kPieces || offset != Rows::row(row) + place * kPieceBytes ||
          Rows::advance(first, piece / 2) != static_cast<std::uint32_t>(offset)) {
        return false;
      }
      places |= 1U << place;
    }
    if (places != 0xFFFFFFFFU >> (32 - Rows::kPieces)) {
      return false;
    }
  }
  return without_bank_conflicts(Rows::kPieces, Rows::offset);
}
static_assert(permutes_rows<64>() && permutes_rows<96>() && permutes_rows<128>() && permutes_rows<256>());

template <int Columns, int Shift>
constexpr bool rows_are_swizzled() {
  using Rows = SwizzledRows<Columns>;
  constexpr auto kLayout = cute::composition(cute::Swizzle<3, 3, Shift>{},
                                             Layout<Shape<Int<kRows>, Int<Columns>>, Stride<Int<Columns>, _1>>{});
  return same(kLayout, Rows::kPieces, Rows::offset);
}
static_assert(rows_are_swizzled<64, 3>() && rows_are_swizzled<128, 4>() && rows_are_swizzled<256, 5>());

template <int Columns>
constexpr bool rows_are_padded() {
  using Rows = PaddedRows<Columns>;
  constexpr Layout<Shape<Int<kRows>, Int<Columns>>, Stride<Int<Columns + kPieceElements>, _1>> kLayout{};
  const auto offset = [](int row, int piece) { return Rows::row(row) + Rows::in_row(piece); };
  return same(kLayout, Rows::kPieces, offset) && without_bank_conflicts(Rows::kPieces, offset);
}
static_assert(rows_are_padded<64>() && rows_are_padded<96>() && rows_are_padded<128>() && rows_are_padded<256>());

}  // namespace
}  // namespace zipvl::cuda
