// The selected rows of K and V, moved to the front: what `drop` keeps as the cache (ZipVL Algorithm 1).
#include <algorithm>

#include "cpu/host_reads.h"
#include "cpu/kernels.h"
#include "ops/aten.h"

namespace zipvl::aten {
namespace {

// x [H, N, D], position [n] -> rows 0..n of target [H, N, D]
void pack_rows(const Tensor& x, const Tensor& position, const Tensor& target) {
  copy_into(slice(target, 1, 0, position.size(0)), take_rows(x, position));
}

}  // namespace

std::tuple<Tensor, Tensor> pack_kv(const Tensor& k, const Tensor& v, const Tensor& index, const Tensor& count) {
  const std::int64_t batch = k.size(0), tokens = k.size(2);
  const Sizes sizes{batch, k.size(1), tokens, k.size(3)};
  const Tensor k_packed = empty(sizes, k.scalar_type(), k.device());
  const Tensor v_packed = empty(sizes, v.scalar_type(), v.device());
  const Tensor first = scalar(0, ScalarType::Long);
  const Tensor last = scalar(static_cast<double>(tokens - 1), ScalarType::Long);
  const Tensor inside = minimum(maximum(to(index, ScalarType::Long), first), last);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t places = host_may_read(k) ? host_count(count, b, tokens) : tokens;
    const Tensor position = slice(select(inside, 0, b), 0, 0, places);
    pack_rows(select(k, 0, b), position, select(k_packed, 0, b));
    pack_rows(select(v, 0, b), position, select(v_packed, 0, b));
  }
  return {k_packed, v_packed};
}

}  // namespace zipvl::aten
