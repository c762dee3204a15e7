// The registration of an op: its schema once, and its function for the CPU (libzipvl_ops) or CUDA (libzipvl_cuda).
// From the dispatcher's stack to a struct of arguments and back, over the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace zipvl::ops {

// The arguments of a call in the order of the schema. Each is read once.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  torch::stable::Tensor tensor() { return read<torch::stable::Tensor>(); }
  std::optional<torch::stable::Tensor> optional_tensor() { return read<std::optional<torch::stable::Tensor>>(); }
  double real() { return read<double>(); }
  std::optional<double> optional_real() { return read<std::optional<double>>(); }
  std::int64_t integer() { return read<std::int64_t>(); }
  std::vector<std::int64_t> integers() { return read<std::vector<std::int64_t>>(); }
  bool flag() { return read<bool>(); }
  std::string text() { return read<std::string>(); }

 private:
  template <typename T>
  T read() {
    return torch::stable::detail::to<T>(*next_++);
  }
  StableIValue* next_;
};

template <typename Op>
struct OpTraits;
template <typename R, typename A>
struct OpTraits<R (*)(const A&)> {
  using Result = R;
  using Args = A;
};

// `Op` takes a struct that has `static Args read(Arguments&)` and returns a Tensor, a std::string or a tuple of
// Tensors.
template <auto Op>
void boxed(StableIValue* stack, std::uint64_t /*inputs*/, std::uint64_t /*outputs*/) {
  using torch::stable::detail::from;
  using Traits = OpTraits<decltype(Op)>;
  Arguments arguments(stack);
  auto result = Op(Traits::Args::read(arguments));
  if constexpr (requires { std::tuple_size<typename Traits::Result>::value; }) {
    std::apply([stack](auto&... results) mutable { ((*stack++ = from(std::move(results))), ...); }, result);
  } else {
    stack[0] = from(std::move(result));
  }
}

// How a call would run: "cpu", "sm90", "sm80", "aten" (correct, over ATen's ops on the GPU) or "unavailable" (an
// error); and why not a native kernel, or empty.
struct Implementation {
  std::string name, reason;
};

// Tells what an op would run on inputs like q [B, H, N, D] of a CUDA device.
using Explain = Implementation (*)(const torch::stable::Tensor& q);

// The ops of this library, a list that grows while it is loaded; without `explain` in the CPU's.
struct Explanation {
  const char* op;
  Explain explain;
  const Explanation* next;
  static inline const Explanation* first = nullptr;
  Explanation(const char* name, Explain function) : op(name), explain(function), next(first) { first = this; }
};

}  // namespace zipvl::ops

// The library of torch.ops that the ops are in. A build that lies beside another one in one process has its own.
#ifndef ZIPVL_OP_NAMESPACE
#define ZIPVL_OP_NAMESPACE zipvl
#endif

#ifdef ZIPVL_CUDA_OPS
#define ZIPVL_REGISTER(name, schema, explain) \
  static const zipvl::ops::Explanation explanation_of_##name(#name, explain);
#define ZIPVL_OP_DEVICE CUDA
#else
#define ZIPVL_REGISTER(name, schema, explain)                                               \
  STABLE_TORCH_LIBRARY_FRAGMENT(ZIPVL_OP_NAMESPACE, library) { library.def(#name schema); } \
  static const zipvl::ops::Explanation explanation_of_##name(#name, nullptr);
#define ZIPVL_OP_DEVICE CPU
#endif

// The function zipvl::ops::`name` as the op `name` of this library's device; `explain` is for CUDA alone.
#define ZIPVL_OP(name, schema, explain)                                     \
  ZIPVL_REGISTER(name, schema, explain)                                     \
  STABLE_TORCH_LIBRARY_IMPL(ZIPVL_OP_NAMESPACE, ZIPVL_OP_DEVICE, library) { \
    library.impl(#name, &zipvl::ops::boxed<&zipvl::ops::name>);             \
  }
