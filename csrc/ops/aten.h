// ATen's own ops, called through the dispatcher over the stable ABI. One line an op: what the implementations in this
// folder use and no more. The stable ABI carries no `Scalar`, so constants are 0-d tensors (`scalar`), which broadcast
// against tensors of any device and never promote a dtype of their own category.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace zipvl::aten {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

template <typename Result>
struct result_count : std::integral_constant<std::size_t, 1> {};
template <typename... Results>
struct result_count<std::tuple<Results...>> : std::integral_constant<std::size_t, sizeof...(Results)> {};

// Calls `name.overload` with every argument of its schema, defaults included. Result: Tensor or a tuple of Tensors.
template <typename Result = Tensor, typename... Args>
Result call(const char* name, const char* overload, const Args&... args) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  constexpr std::size_t kResults = result_count<Result>::value;
  std::array<StableIValue, std::max(sizeof...(Args), kResults)> stack{from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  if constexpr (std::is_same_v<Result, Tensor>) {
    return to<Tensor>(stack[0]);
  } else {
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
      return Result{to<std::tuple_element_t<I, Result>>(stack[I])...};
    }(std::make_index_sequence<kResults>{});
  }
}

// ---- making tensors
inline Tensor full(const Sizes& sizes, double value, ScalarType dtype, Device device) {
  return torch::stable::full(sizes, value, dtype, std::nullopt, device);
}
inline Tensor zeros(const Sizes& sizes, ScalarType dtype, Device device) { return full(sizes, 0.0, dtype, device); }
inline Tensor empty(const Sizes& sizes, ScalarType dtype, Device device) {
  return torch::stable::empty(sizes, dtype, std::nullopt, device);
}
inline Tensor scalar(double value, ScalarType dtype) {
  return full({}, value, dtype, Device(torch::headeronly::DeviceType::CPU));
}
// For `where`, which copies a scalar of another device to its own and waits for the copy.
inline Tensor scalar(double value, ScalarType dtype, Device device) { return full({}, value, dtype, device); }

// ---- shapes
using torch::stable::reshape;
using torch::stable::select;
using torch::stable::transpose;
using torch::stable::unsqueeze;
inline Tensor slice(Tensor x, std::int64_t dim, std::int64_t start, std::int64_t length) {
  return torch::stable::narrow(x, dim, start, length);
}
inline Tensor expand(const Tensor& x, const Sizes& sizes) { return call("aten::expand", "", x, sizes, false); }
inline Tensor contiguous(const Tensor& x) { return torch::stable::contiguous(x); }

// ---- elementwise
inline Tensor to(const Tensor& x, ScalarType dtype) { return torch::stable::to(x, dtype); }
inline Tensor less(const Tensor& a, const Tensor& b) { return call("aten::lt", "Tensor", a, b); }
inline Tensor less_equal(const Tensor& a, const Tensor& b) { return call("aten::le", "Tensor", a, b); }
inline Tensor logical_and(const Tensor& a, const Tensor& b) { return call("aten::logical_and", "", a, b); }
inline Tensor logical_or(const Tensor& a, const Tensor& b) { return call("aten::logical_or", "", a, b); }
inline Tensor logical_not(const Tensor& a) { return call("aten::logical_not", "", a); }
inline Tensor isfinite(const Tensor& a) { return call("aten::isfinite", "", a); }
inline Tensor equal(const Tensor& a, const Tensor& b) { return call("aten::eq", "Tensor", a, b); }
inline Tensor minimum(const Tensor& a, const Tensor& b) { return call("aten::minimum", "", a, b); }
inline Tensor maximum(const Tensor& a, const Tensor& b) { return call("aten::maximum", "", a, b); }
inline Tensor multiply(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }
inline Tensor divide(const Tensor& a, const Tensor& b) { return call("aten::div", "Tensor", a, b); }
// Floating tensors only: ATen refuses the stable ABI's floating alpha for integers. Counts are float64 where they are
// added, exact to 2**53.
inline Tensor minus(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b); }
inline Tensor plus(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, /*alpha=*/-1.0); }
// Whole numbers below 2**53, of any dtype.
inline Tensor shifted(const Tensor& a, std::int64_t by) {
  return to(plus(to(a, ScalarType::Double), scalar(static_cast<double>(by), ScalarType::Double)), a.scalar_type());
}
inline Tensor ceil(const Tensor& a) { return call("aten::ceil", "", a); }
inline Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  return call("aten::where", "self", condition, a, b);
}
inline void masked_fill_(const Tensor& x, const Tensor& mask, double value) {
  call("aten::masked_fill_", "Tensor", x, mask, scalar(value, x.scalar_type()));
}

// ---- reductions, scans, sorting
inline Tensor sum(const Tensor& x, std::int64_t dim, bool keepdim, std::optional<ScalarType> dtype = std::nullopt) {
  return call("aten::sum", "dim_IntList", x, std::optional<Sizes>(Sizes{dim}), keepdim, dtype);
}
inline Tensor all(const Tensor& x, std::int64_t dim, bool keepdim) { return call("aten::all", "dim", x, dim, keepdim); }
inline Tensor any(const Tensor& x, std::int64_t dim, bool keepdim) { return call("aten::any", "dim", x, dim, keepdim); }
inline Tensor cumsum(const Tensor& x, std::int64_t dim, ScalarType dtype) {
  return call("aten::cumsum", "", x, dim, std::optional<ScalarType>(dtype));
}
inline Tensor logsumexp(const Tensor& x, std::int64_t dim) { return call("aten::logsumexp", "", x, Sizes{dim}, false); }
inline Tensor softmax(const Tensor& x, std::int64_t dim) { return call("aten::_softmax", "", x, dim, false); }
// Equal values keep their order.
inline std::tuple<Tensor, Tensor> sort(const Tensor& x, std::int64_t dim, bool descending) {
  return call<std::tuple<Tensor, Tensor>>("aten::sort", "stable", x, std::optional<bool>(true), dim, descending);
}
// 0, 1, ..., n - 1
inline Tensor iota(std::int64_t n, ScalarType dtype, Device device) {
  const Tensor steps = full({n}, 1.0, dtype, device);
  Tensor first = slice(steps, 0, 0, 1);
  torch::stable::zero_(first);
  return cumsum(steps, 0, dtype);
}

// ---- indexing
inline Tensor index_select(const Tensor& x, std::int64_t dim, const Tensor& index) {
  return call("aten::index_select", "", x, dim, index);
}
// Rows `position` of every head: x [H, N, D] -> [H, n, D]. index_select copies a whole strided input first, so a view
// of [N, H, D] is indexed the way it lies.
inline Tensor take_rows(const Tensor& x, const Tensor& position) {
  return x.stride(0) < x.stride(1) ? transpose(index_select(transpose(x, 0, 1), 0, position), 0, 1)
                                   : index_select(x, 1, position);
}
inline void index_copy_(const Tensor& x, std::int64_t dim, const Tensor& index, const Tensor& source) {
  call("aten::index_copy_", "", x, dim, index, source);
}
inline Tensor scatter(const Tensor& x, std::int64_t dim, const Tensor& index, const Tensor& source) {
  return call("aten::scatter", "src", x, dim, index, source);
}
inline void copy_into(Tensor target, const Tensor& source) { torch::stable::copy_(target, source); }

// ---- matrix products
using torch::stable::matmul;
// a [b, n, m], b [b, m, c] into target [b, n, c] of any strides
inline void multiply_into(const Tensor& target, const Tensor& a, const Tensor& b) {
  call("aten::bmm", "out", a, b, target);
}

}  // namespace zipvl::aten
