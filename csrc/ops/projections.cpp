// project_queries and project_outputs: linear layers on chosen rows alone (docs/ops.md). On CUDA chosen rows are moved
// to the front, a product computes as many of them as there are (a grouped product of one group, whose size stands on
// the device), and the results go where they belong. Only the device knows how many there are, and memory for every
// place would be that of two more results: so it is done chunk after chunk.
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include <algorithm>
#include <limits>

#include "common/math.h"
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace {

// Which rows: index [B, M], count [B].
void check_rows(const char* op, const ops::Tensor& x, const ops::Tensor& index, const ops::OptionalTensor& count) {
  checks::rank(op, {"index", index}, 2, "[B, M]");
  checks::dtype(op, {"index", index}, checks::ScalarType::Int);
  checks::shape(op, {"index", index}, {x.size(0), index.size(1)});
  checks::same_device(op, x, {"index", index});
  if (count) {
    checks::int_vector(op, x, {"count", *count}, x.size(0));
  }
}

}  // namespace

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr std::int64_t kMaxChunks = 8;    // an empty one costs four launches, some 10 us
constexpr std::int64_t kMinChunk = 4096;  // rows; a product of 3,584 columns has tiles for seven waves on an H100

bool is_aligned(const Tensor& x, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % static_cast<std::uintptr_t>(bytes) == 0;
}

// Rows are numbered with 32 bits.
std::string why_not_places(const Tensor& index) {
  const std::int64_t places = index.size(0) * index.size(1);
  return places > std::numeric_limits<std::int32_t>::max()
             ? join("the kernels take fewer than 2**31 places, got ", places)
             : std::string();
}

// Between `full` [B, N, C], whose rows are vectors, and `packed` [chunk, C].
CopyRowsParams copy_params(const ChosenRows& chosen, const Tensor& full, const Tensor& packed) {
  const auto element = static_cast<std::int64_t>(full.element_size());
  CopyRowsParams params{};
  params.chosen = chosen;
  params.packed = packed.mutable_data_ptr();
  params.full = const_cast<void*>(full.const_data_ptr());
  params.full_stride[0] = full.size(0) > 1 ? full.stride(0) * element / kVectorBytes : 0;
  params.full_stride[1] = full.size(1) > 1 ? full.stride(1) * element / kVectorBytes : 0;
  params.row_vectors = full.size(2) * element / kVectorBytes;
  params.num_sms = num_sms(full.get_device_index());
  return params;
}

// Whether the product of rows of `x` can be told on the device how many there are. PyTorch's grouped product is
// CUTLASS's on Hopper for bfloat16; elsewhere it would read the sizes back.
bool product_can_count(const Tensor& x, const Tensor& weight) {
  return kernel_family(x.get_device_index()) == KernelFamily::kSm90 && x.scalar_type() == ScalarType::BFloat16 &&
         weight.size(0) % 8 == 0 && weight.size(1) % 8 == 0 && weight.stride(1) == 1 && weight.stride(0) % 8 == 0 &&
         is_aligned(weight, kVectorBytes);
}

// A chunk of the chosen rows of a tensor times a weight [O, C].
struct Product {
  ChosenRows chosen;
  Tensor packed;  // [chunk, O]; rows from the number that the chunk has on are undefined
  bool has_bias;
};

// Every chunk's product in turn, `put_back` called with each.
template <typename PutBack>
void products(const char* op, ChosenRows chosen, const Tensor& x, const Tensor& weight, const ops::OptionalTensor& bias,
              const PutBack& put_back) {
  const bool counts = chosen.count != nullptr && product_can_count(x, weight);
  const Tensor group = counts ? aten::unsqueeze(aten::transpose(weight, 0, 1), 0) : weight;
  const std::int64_t places = chosen.batch * chosen.places;
  const std::int64_t chunk = std::min(places, std::max(kMinChunk, ceil_div(places, kMaxChunks)));
  const Tensor packed = empty({chunk, x.size(2)}, x.scalar_type(), x);
  const Tensor total = empty({1}, ScalarType::Int, x);
  for (chosen.first = 0; chosen.first < places; chosen.first += chunk) {
    chosen.chunk = std::min(chunk, places - chosen.first);
    const Tensor rows = aten::slice(packed, 0, 0, chosen.chunk);
    CopyRowsParams params = copy_params(chosen, x, rows);
    params.total = counts ? total.mutable_data_ptr<std::int32_t>() : nullptr;
    check_launch(op, launch_gather_rows(params, stream_of(x)));
    if (counts) {
      put_back(Product{chosen,
                       aten::call("aten::_grouped_mm", "", rows, group, std::optional<Tensor>(total),
                                  std::optional<Tensor>(), std::optional<ScalarType>()),
                       false});
    } else {
      put_back(Product{chosen, aten::call("aten::linear", "", rows, weight, bias), true});
    }
  }
}

void set_table(const void*& data, std::int64_t (&strides)[2], const Tensor& table) {
  data = table.const_data_ptr();
  strides[0] = table.size(0) == 1 ? 0 : table.stride(0);
  strides[1] = table.stride(1);
}

// Whether elements d and d + 1 of every row can be read at once.
bool pairs_are_aligned(const Tensor& x) {
  bool even = is_aligned(x, static_cast<std::int64_t>(2 * x.element_size())) && x.stride(x.dim() - 1) == 1;
  for (std::int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    even = even && (x.size(dim) == 1 || x.stride(dim) % 2 == 0);
  }
  return even;
}

// Without which rows, products and bias.
PlaceQueriesParams place_params(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                const ops::OptionalTensor& norm_weight, double norm_eps, const Tensor& q) {
  PlaceQueriesParams params{};
  params.element = element_of(x);
  params.norm_weight = norm_weight ? norm_weight->const_data_ptr() : nullptr;
  params.norm_eps = static_cast<float>(norm_eps);
  set_table(params.cos, params.cos_stride, cos);
  set_table(params.sin, params.sin_stride, sin);
  params.q = q.mutable_data_ptr();
  params.heads = q.size(2);
  params.head_dim = static_cast<int>(q.size(3));
  params.num_sms = num_sms(x.get_device_index());
  return params;
}

}  // namespace

ChosenRows chosen_rows(const Tensor& index, const ops::OptionalTensor& count, std::int64_t tokens) {
  ChosenRows chosen{};
  chosen.index = matrix<std::int32_t>(index, chosen.index_stride);
  chosen.count = count ? count->const_data_ptr<std::int32_t>() : nullptr;
  chosen.count_stride = count ? count->stride(0) : 0;
  chosen.batch = index.size(0);
  chosen.places = index.size(1);
  chosen.tokens = tokens;
  chosen.chunk = chosen.batch * chosen.places;
  return chosen;
}

std::string why_not_rows(const Tensor& x) {
  if (!is_half(x)) {
    return "the kernels take float16 and bfloat16";
  }
  if (!rows_are_aligned(x) || x.size(2) * static_cast<std::int64_t>(x.element_size()) % kVectorBytes != 0 ||
      (x.size(2) > 1 && x.stride(2) != 1)) {
    return "the kernels take rows of x that begin at multiples of 16 bytes and have as many";
  }
  return "";
}

std::string why_not_query_projection(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                     const ops::OptionalTensor& bias, const ops::OptionalTensor& norm_weight) {
  const std::int64_t head_dim = cos.size(2);
  if (std::string reason = why_not_rows(x); !reason.empty()) {
    return reason;
  }
  if (head_dim % 4 != 0 || head_dim > PlaceQueriesParams::kMaxHeadDim) {
    return join("the kernels take a head_dim that is a multiple of 4 up to ", PlaceQueriesParams::kMaxHeadDim, ", got ",
                head_dim);
  }
  if (!pairs_are_aligned(cos) || !pairs_are_aligned(sin) || (bias && !pairs_are_aligned(*bias)) ||
      (norm_weight && !pairs_are_aligned(*norm_weight))) {
    return "the kernels take cos, sin, bias and norm weight in rows that begin at even elements";
  }
  return "";
}

void project_chosen_queries(const char* op, const ChosenRows& chosen, const Tensor& x, const Tensor& weight,
                            const ops::OptionalTensor& bias, const Tensor& cos, const Tensor& sin,
                            const ops::OptionalTensor& norm_weight, double norm_eps, const Tensor& q) {
  PlaceQueriesParams params = place_params(x, cos, sin, norm_weight, norm_eps, q);
  products(op, chosen, x, weight, bias, [&](const Product& product) {
    params.chosen = product.chosen;
    params.packed = product.packed.const_data_ptr();
    params.bias = bias && !product.has_bias ? bias->const_data_ptr() : nullptr;
    check_launch(op, launch_place_queries(params, stream_of(x)));
  });
}

void project_all_queries(const char* op, const Tensor& x, const Tensor& weight, const ops::OptionalTensor& bias,
                         const Tensor& cos, const Tensor& sin, const ops::OptionalTensor& norm_weight, double norm_eps,
                         const Tensor& q) {
  const Tensor product = aten::call("aten::linear", "", x, weight, bias);
  const Tensor every =
      aten::expand(aten::unsqueeze(aten::iota(x.size(1), ScalarType::Int, x.device()), 0), {x.size(0), x.size(1)});
  PlaceQueriesParams params = place_params(x, cos, sin, norm_weight, norm_eps, q);
  params.chosen = chosen_rows(every, std::nullopt, x.size(1));
  params.packed = product.const_data_ptr();
  check_launch(op, launch_place_queries(params, stream_of(x)));
}

std::string why_not_output_projection(const Tensor& weight) {
  if (!is_half(weight)) {
    return "the kernels take float16 and bfloat16";
  }
  if (weight.size(0) * static_cast<std::int64_t>(weight.element_size()) % kVectorBytes != 0) {
    return join("the kernels take rows of outputs of a multiple of 16 bytes, got ", weight.size(0), " outputs");
  }
  return "";
}

void project_chosen_outputs(const char* op, const ChosenRows& chosen, const Tensor& x, const Tensor& weight,
                            const Tensor& out) {
  products(op, chosen, x, weight, std::nullopt, [&](const Product& product) {
    check_launch(op, launch_scatter_rows(copy_params(product.chosen, out, product.packed), stream_of(x)));
  });
}

namespace {

ops::Implementation explain(const Tensor& x) {
  return implementation_of(KernelFamily::kSm80, is_half(x) ? "" : "the kernels take float16 and bfloat16");
}

// Nothing where no kernel takes these inputs.
std::optional<Tensor> run(const ops::ProjectQueriesArgs& args) {
  const auto& [x, weight, bias, cos, sin, index, count, norm_weight, norm_eps] = args;
  if (index.size(1) == 0 || x.size(2) == 0 || !why_not_places(index).empty() ||
      !why_not_query_projection(x, cos, sin, bias, norm_weight).empty()) {
    return std::nullopt;
  }
  const DeviceGuard guard(x.get_device_index());
  const Tensor q = empty({x.size(0), x.size(1), weight.size(0) / cos.size(2), cos.size(2)}, x.scalar_type(), x);
  project_chosen_queries("project_queries", chosen_rows(index, count, x.size(1)), x, weight, bias, cos, sin,
                         norm_weight, norm_eps, q);
  return aten::transpose(q, 1, 2);
}

std::optional<Tensor> run(const ops::ProjectOutputsArgs& args) {
  const auto& [x, weight, index, count] = args;
  if (index.size(1) == 0 || x.size(2) == 0 || !why_not_places(index).empty() ||
      !why_not_output_projection(weight).empty() || !why_not_rows(x).empty()) {
    return std::nullopt;
  }
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = aten::zeros({x.size(0), x.size(1), weight.size(0)}, x.scalar_type(), x.device());
  project_chosen_outputs("project_outputs", chosen_rows(index, count, x.size(1)), x, weight, out);
  return out;
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

Tensor project_queries(const ProjectQueriesArgs& args) {
  constexpr const char* kOp = "project_queries";
  const auto& [x, weight, bias, cos, sin, index, count, norm_weight, norm_eps] = args;
  checks::linear(kOp, {"x", x}, {"weight", weight});
  check_rows(kOp, x, index, count);
  checks::query_projection(kOp, {{"x", x},
                                 {"weight", weight},
                                 "bias",
                                 bias,
                                 {"cos", cos},
                                 {"sin", sin},
                                 "norm_weight",
                                 norm_weight,
                                 "norm_eps",
                                 norm_eps});
  const std::int64_t batch = x.size(0), tokens = x.size(1), head_dim = cos.size(2);
  if (batch == 0 || tokens == 0) {
    const aten::Sizes shape{batch, tokens, weight.size(0) / head_dim, head_dim};
    return aten::transpose(aten::empty(shape, x.scalar_type(), x.device()), 1, 2);
  }
#ifdef ZIPVL_CUDA_OPS
  if (auto q = cuda::run(args)) {
    return *q;
  }
#endif
  return cpu::project_queries(args);
}

Tensor project_outputs(const ProjectOutputsArgs& args) {
  constexpr const char* kOp = "project_outputs";
  const auto& [x, weight, index, count] = args;
  checks::linear(kOp, {"x", x}, {"weight", weight});
  check_rows(kOp, x, index, count);
  if (x.size(0) == 0 || x.size(1) == 0) {
    return aten::empty({x.size(0), x.size(1), weight.size(0)}, x.scalar_type(), x.device());
  }
#ifdef ZIPVL_CUDA_OPS
  if (auto out = cuda::run(args)) {
    return *out;
  }
#endif
  return cpu::project_outputs(args);
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(project_queries,
         "(Tensor x, Tensor weight, Tensor? bias, Tensor cos, Tensor sin, Tensor index, Tensor? count=None, *, "
         "Tensor? norm_weight=None, float norm_eps=1e-06) -> Tensor",
         &zipvl::cuda::explain)
ZIPVL_OP(project_outputs, "(Tensor x, Tensor weight, Tensor index, Tensor count) -> Tensor", &zipvl::cuda::explain)
