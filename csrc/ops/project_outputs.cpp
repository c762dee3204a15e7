#include "cpu/kernels.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::ops {

Tensor project_outputs(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count) {
  checks::project_outputs("project_outputs", x, weight, index, count);
  if (x.size(0) == 0 || x.size(1) == 0) {
    return aten::empty({x.size(0), x.size(1), weight.size(0)}, x.scalar_type(), x.device());
  }
  return aten::project_outputs(x, weight, index, count);
}

}  // namespace zipvl::ops
