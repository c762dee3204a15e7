// Linear layers on chosen rows alone (queries of the tokens that need one, outputs of the tokens that have one), each
// step rounded as transformers' modules round it.
#include "cpu/cpu.h"
#include "cpu/tokens.h"
#include "ops/aten.h"

namespace zipvl::cpu {

using namespace aten;
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call("aten::linear", "", x, weight, bias);
}

std::optional<Tensor> row_of(const std::optional<Tensor>& count, std::int64_t b) {
  return count ? std::optional<Tensor>(select(*count, 0, b)) : std::nullopt;
}

// x [n, Hq, D] in any dtype -> x / rms(x) * weight [D], in float32 up to the last product.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor wide = to(x, ScalarType::Float);
  const Tensor mean_square = call("aten::mean", "dim", multiply(wide, wide), std::optional<Sizes>(Sizes{2}), true,
                                  std::optional<ScalarType>());
  const Tensor factor = call("aten::rsqrt", "", plus(mean_square, scalar(eps, ScalarType::Float)));
  return multiply(weight, to(multiply(wide, factor), x.scalar_type()));
}

// x [n, Hq, D], cos, sin [n, D] -> x * cos + rotate_half(x) * sin
Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const std::int64_t half = x.size(2) / 2;
  const auto part = [&](const Tensor& t, std::int64_t which) { return slice(t, t.dim() - 1, which * half, half); };
  const auto wide = [&](const Tensor& t, std::int64_t which) { return unsqueeze(part(t, which), 1); };
  const Tensor low = part(x, 0), high = part(x, 1);
  const Tensor out = empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type(), x.device());
  copy_into(part(out, 0), minus(multiply(low, wide(cos, 0)), multiply(high, wide(sin, 0))));
  copy_into(part(out, 1), plus(multiply(high, wide(cos, 1)), multiply(low, wide(sin, 1))));
  return out;
}

}  // namespace

Tensor project_queries(const ops::ProjectQueriesArgs& args) {
  const auto& [x, weight, bias, cos, sin, index, count, norm_weight, norm_eps] = args;
  const std::int64_t batch = x.size(0), tokens = x.size(1), head_dim = cos.size(2), heads = weight.size(0) / head_dim;
  const Tensor q = empty({batch, tokens, heads, head_dim}, x.scalar_type(), x.device());
  for (std::int64_t b = 0; b < batch; ++b) {
    // An entry that names no token, where it cannot be left out, stands for token 0: its query is right and unasked
    // for.
    const Tensor position = positions_of(select(index, 0, b), row_of(count, b), tokens).position;
    const auto rows = [&](const Tensor& t) { return index_select(select(t, 0, t.size(0) == 1 ? 0 : b), 0, position); };
    Tensor queries = reshape(linear(rows(x), weight, bias), {position.size(0), heads, head_dim});
    if (norm_weight) {
      queries = rms_norm(queries, *norm_weight, norm_eps);
    }
    index_copy_(select(q, 0, b), 0, position, rotated(queries, rows(cos), rows(sin)));
  }
  return transpose(q, 1, 2);
}

Tensor project_outputs(const ops::ProjectOutputsArgs& args) {
  const auto& [x, weight, index, count] = args;
  const std::int64_t batch = x.size(0), tokens = x.size(1);
  const Tensor out = zeros({batch, tokens, weight.size(0)}, x.scalar_type(), x.device());
  for (std::int64_t b = 0; b < batch; ++b) {
    const Positions chosen = positions_of(select(index, 0, b), select(count, 0, b), tokens);
    const Tensor rows = select(x, 0, b), target = select(out, 0, b);
    if (!chosen.valid) {
      index_copy_(target, 0, chosen.position, linear(index_select(rows, 0, chosen.position), weight, std::nullopt));
      continue;
    }
    // Only the device knows which rows count: all are computed, and those of the extra last entry are of no token.
    const Tensor nowhere = scalar(static_cast<double>(tokens), ScalarType::Long, x.device());
    const Tensor named = where(*chosen.valid, chosen.position, nowhere);
    const Tensor unset = full({tokens + 1}, 1.0, ScalarType::Bool, x.device());
    const Tensor absent = slice(scatter(unset, 0, named, logical_not(*chosen.valid)), 0, 0, tokens);
    copy_into(target, linear(rows, weight, std::nullopt));
    masked_fill_(target, unsqueeze(absent, 1), 0.0);
  }
  return out;
}

}  // namespace zipvl::cpu
