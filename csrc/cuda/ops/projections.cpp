// project_queries and project_outputs. Chosen rows are moved to the front, a product computes as many of them as there
// are (a grouped product of one group, whose size stands on the device), and the results go where they belong. Only the
// device knows how many there are, and memory for every place would be that of two more results: so it is done chunk
// after chunk.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <limits>

#include "cuda/ops/device.h"
#include "cuda/ops/ops.h"
#include "cuda/projections/projections.h"
#include "ops/aten.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace zipvl::cuda {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr std::int64_t kMaxChunks = 8;    // an empty one costs four launches, some 10 us
constexpr std::int64_t kMinChunk = 4096;  // rows; a product of 3,584 columns has tiles for seven waves on an H100

bool is_aligned(const Tensor& x, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % static_cast<std::uintptr_t>(bytes) == 0;
}

// Whether every row x[b, n] begins at a multiple of 16 bytes and consists of such vectors.
bool rows_are_vectors(const Tensor& x) {
  const auto element = static_cast<std::int64_t>(x.element_size());
  const auto fits = [&](std::int64_t elements) { return elements * element % kVectorBytes == 0; };
  return is_aligned(x, kVectorBytes) && fits(x.size(2)) && (x.size(0) == 1 || fits(x.stride(0))) &&
         (x.size(1) == 1 || fits(x.stride(1))) && (x.size(2) == 1 || x.stride(2) == 1);
}

bool kernels_take(const Tensor& x, const Tensor& index) {
  const auto type = x.scalar_type();
  const std::int64_t rows = index.size(0) * index.size(1);
  return (type == aten::ScalarType::Half || type == aten::ScalarType::BFloat16) && rows_are_vectors(x) &&
         x.numel() > 0 && rows > 0 && rows <= std::numeric_limits<std::int32_t>::max();
}

// Every place, in one chunk.
ChosenRows chosen_rows(const Tensor& index, const std::optional<Tensor>& count, std::int64_t tokens) {
  ChosenRows chosen{};
  chosen.index = index.const_data_ptr<std::int32_t>();
  chosen.index_stride[0] = index.stride(0);
  chosen.index_stride[1] = index.stride(1);
  chosen.count = count ? count->const_data_ptr<std::int32_t>() : nullptr;
  chosen.count_stride = count ? count->stride(0) : 0;
  chosen.batch = index.size(0);
  chosen.places = index.size(1);
  chosen.tokens = tokens;
  chosen.first = 0;
  chosen.chunk = chosen.batch * chosen.places;
  return chosen;
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
  return kernel_family(x.get_device_index()) == KernelFamily::kSm90 && x.scalar_type() == aten::ScalarType::BFloat16 &&
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
void products(const char* op, ChosenRows chosen, const Tensor& x, const Tensor& weight,
              const std::optional<Tensor>& bias, const PutBack& put_back) {
  const bool counts = chosen.count != nullptr && product_can_count(x, weight);
  const Tensor group = counts ? aten::unsqueeze(aten::transpose(weight, 0, 1), 0) : weight;
  const std::int64_t places = chosen.batch * chosen.places;
  const std::int64_t chunk = std::min(places, std::max(kMinChunk, (places + kMaxChunks - 1) / kMaxChunks));
  const Tensor packed = aten::empty({chunk, x.size(2)}, x.scalar_type(), x.device());
  const Tensor total = aten::empty({1}, aten::ScalarType::Int, x.device());
  for (; chosen.first < places; chosen.first += chunk) {
    chosen.chunk = std::min(chunk, places - chosen.first);
    const Tensor rows = aten::slice(packed, 0, 0, chosen.chunk);
    CopyRowsParams params = copy_params(chosen, x, rows);
    params.total = counts ? total.mutable_data_ptr<std::int32_t>() : nullptr;
    check_launch(op, launch_gather_rows(params, stream_of(x)));
    if (counts) {
      const Tensor product = aten::call("aten::_grouped_mm", "", rows, group, std::optional<Tensor>(total),
                                        std::optional<Tensor>(), std::optional<aten::ScalarType>());
      put_back(Product{chosen, product, false});
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
  const auto bytes = static_cast<std::int64_t>(2 * x.element_size());
  bool even = is_aligned(x, bytes) && x.stride(x.dim() - 1) == 1;
  for (std::int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    even = even && (x.size(dim) == 1 || x.stride(dim) % 2 == 0);
  }
  return even;
}

}  // namespace

Tensor project_queries(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& cos,
                       const Tensor& sin, const Tensor& index, const std::optional<Tensor>& count,
                       const std::optional<Tensor>& norm_weight, double norm_eps) {
  constexpr const char* kOp = "project_queries";
  checks::project_queries(kOp, x, weight, bias, cos, sin, index, count, norm_weight, norm_eps);
  const std::int64_t head_dim = cos.size(2), heads = weight.size(0) / head_dim;
  const auto pairs = [](const std::optional<Tensor>& t) { return !t || pairs_are_aligned(*t); };
  if (!kernels_take(x, index) || head_dim % 4 != 0 || head_dim > PlaceQueriesParams::kMaxHeadDim || !pairs(cos) ||
      !pairs(sin) || !pairs(bias) || !pairs(norm_weight)) {
    return ops::project_queries(x, weight, bias, cos, sin, index, count, norm_weight, norm_eps);
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor q = aten::empty({x.size(0), x.size(1), heads, head_dim}, x.scalar_type(), x.device());
  PlaceQueriesParams params{};
  params.element = x.scalar_type() == aten::ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
  params.norm_weight = norm_weight ? norm_weight->const_data_ptr() : nullptr;
  params.norm_eps = static_cast<float>(norm_eps);
  set_table(params.cos, params.cos_stride, cos);
  set_table(params.sin, params.sin_stride, sin);
  params.q = q.mutable_data_ptr();
  params.heads = heads;
  params.head_dim = static_cast<int>(head_dim);
  params.num_sms = num_sms(x.get_device_index());
  products(kOp, chosen_rows(index, count, x.size(1)), x, weight, bias, [&](const Product& product) {
    params.chosen = product.chosen;
    params.packed = product.packed.const_data_ptr();
    params.bias = bias && !product.has_bias ? bias->const_data_ptr() : nullptr;
    check_launch(kOp, launch_place_queries(params, stream_of(x)));
  });
  return aten::transpose(q, 1, 2);
}

Tensor project_outputs(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count) {
  constexpr const char* kOp = "project_outputs";
  checks::project_outputs(kOp, x, weight, index, count);
  const std::int64_t bytes = weight.size(0) * static_cast<std::int64_t>(weight.element_size());
  if (!kernels_take(x, index) || bytes % kVectorBytes != 0) {
    return ops::project_outputs(x, weight, index, count);
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = aten::zeros({x.size(0), x.size(1), weight.size(0)}, x.scalar_type(), x.device());
  products(kOp, chosen_rows(index, count, x.size(1)), x, weight, std::nullopt, [&](const Product& product) {
    check_launch(kOp, launch_scatter_rows(copy_params(product.chosen, out, product.packed), stream_of(x)));
  });
  return out;
}

}  // namespace zipvl::cuda
