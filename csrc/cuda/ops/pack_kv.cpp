#include "cuda/ops/ops.h"
#include "ops/ops.h"

namespace zipvl::cuda {

std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count) {
  return ops::pack_kv(k, v, index, count);
}

}  // namespace zipvl::cuda
