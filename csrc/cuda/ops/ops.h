// The ops that have native CUDA kernels: check, allocate, launch. Meanings and shapes: ops/ops.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace zipvl::cuda {

using torch::stable::Tensor;

Tensor probe_index(const Tensor& q, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                   const std::optional<Tensor>& token_mask);

}  // namespace zipvl::cuda
