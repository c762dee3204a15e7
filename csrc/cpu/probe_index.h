// The probe tokens of each row (ZipVL Sec. A), by loops over the mask.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace zipvl::cpu {

using torch::stable::Tensor;

// token_mask [B, N] bool or absent -> [B, num_recent + num_random] int32, ascending, padded with -1
Tensor probe_index(std::int64_t batch, std::int64_t tokens, std::int64_t num_recent, std::int64_t num_random,
                   std::int64_t seed, const std::optional<Tensor>& token_mask);

}  // namespace zipvl::cpu
