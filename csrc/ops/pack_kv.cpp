#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {

std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count) {
  checks::pack_kv("pack_kv", k, v, index, count);
  if (k.size(0) == 0 || k.size(2) == 0) {
    const aten::Sizes shape{k.size(0), k.size(1), k.size(2), k.size(3)};
    return {aten::empty(shape, k.scalar_type(), k.device()), aten::empty(shape, v.scalar_type(), v.device())};
  }
  return aten::pack_kv(k, v, index, count);
}

}  // namespace zipvl::ops
