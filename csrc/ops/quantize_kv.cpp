#include "cpu/quantized_cache.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, std::int64_t high_bits,
                                                               std::int64_t low_bits,
                                                               const std::optional<Tensor>& v_factor,
                                                               const std::optional<Tensor>& token_mask) {
  checks::quantize_kv("quantize_kv", k, v, index, count, high_bits, low_bits, v_factor, token_mask);
  return cpu::quantize_kv(k, v, index, count, static_cast<int>(high_bits), static_cast<int>(low_bits), v_factor,
                          token_mask);
}

}  // namespace zipvl::ops
