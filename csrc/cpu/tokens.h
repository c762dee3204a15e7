// Token positions, counts and masks, as the implementations over ATen read them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

namespace zipvl::cpu {

using torch::stable::Tensor;

// Whether counts and positions may be read on the host while an op runs: true for CPU tensors. On any other device a
// read would wait for the device, so the ops compute every place and mask. ZIPVL_NO_HOST_READS in the environment makes
// the CPU go that way too, which is how it is tested without a GPU.
inline bool host_may_read(const Tensor& tensor) {
  static const bool forbidden = std::getenv("ZIPVL_NO_HOST_READS") != nullptr;
  return tensor.is_cpu() && !forbidden;
}

// [n] int64 on the CPU
Tensor long_tensor(const std::vector<std::int64_t>& values);

// Entry i of a 1-d int32 CPU tensor, clamped to [0, max].
std::int64_t host_count(const Tensor& counts, std::int64_t i, std::int64_t max);

// Positions of one batch row, inside [0, N).
struct Positions {
  Tensor position;              // [n] int64
  std::optional<Tensor> valid;  // [n] bool; absent when every entry counts, which is also when the host may read them
};

// The entries of row [n] int32 that lie in [first, tokens), as far as the first `count` (0-d int32; absent: all)
// places. On the CPU only those are returned; on any other device all n, with what counts in `valid` and `first` where
// none does.
Positions positions_of(const Tensor& row, const std::optional<Tensor>& count, std::int64_t tokens,
                       std::int64_t first = 0);

// last_key of one batch row [n] int32, clamped to [-1, tokens): int64
Tensor row_ends(const Tensor& last_key, std::int64_t tokens);

// The columns that a block of rows computes: [0, seen), the first `clear` of them seen by every row.
struct Columns {
  std::int64_t clear, seen;
};

// token_mask, or every token when it is absent: [B, N] bool
Tensor real_tokens(const std::optional<Tensor>& token_mask, std::int64_t batch, std::int64_t tokens,
                   torch::stable::Device device);

// The `max` first or last real tokens of each row: [B, N] bool
Tensor first_real_tokens(const Tensor& real, std::int64_t max);
Tensor last_real_tokens(const Tensor& real, std::int64_t max);

}  // namespace zipvl::cpu
