// Token positions that an int32 index names, and the columns that a block of rows sees.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace zipvl::aten {

using torch::stable::Tensor;

// Positions of one batch row, inside [0, N).
struct Positions {
  Tensor position;              // [n] int64
  std::optional<Tensor> valid;  // [n] bool; absent when every entry counts, which is also when the host may read them
};

// The entries of row [n] int32 that lie in [0, tokens), as far as the first `count` (0-d int32; absent: all) places.
// On the CPU only those are returned; on any other device all n, with what counts in `valid` and 0 where none does.
Positions positions_of(const Tensor& row, const std::optional<Tensor>& count, std::int64_t tokens);

// The columns that a block of rows computes: [0, seen), the first `clear` of them seen by every row.
struct Columns {
  std::int64_t clear, seen;
};

}  // namespace zipvl::aten
