#include "ops/checks.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <string>

#include "common/quantized_block.h"

namespace zipvl::checks {
namespace {

using torch::headeronly::DeviceType;

// PyTorch's own names, as its users write them; any other dtype by C++'s name.
std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string device_text(const Tensor& tensor) {
  switch (tensor.device().type()) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda:" + std::to_string(tensor.get_device_index());
    case DeviceType::Meta:
      return "meta";
    default:
      return "device type " + std::to_string(static_cast<int>(tensor.device().type()));
  }
}

void head_dim(const char* op, Named argument) {
  if (argument.tensor.size(3) < 1) {
    fail(op, argument.name, " must have a head dim of at least 1, got shape ", shape_text(argument.tensor));
  }
}

void attention_tensor(const char* op, Named argument, const char* layout) {
  rank(op, argument, 4, layout);
  floating(op, argument);
  head_dim(op, argument);
  unit_last_stride(op, argument);
}

void same_size(const char* op, Named expected, Named argument, std::int64_t dim, const char* what) {
  if (argument.tensor.size(dim) != expected.tensor.size(dim)) {
    fail(op, argument.name, " must have ", expected.name, "'s ", what, " ", expected.tensor.size(dim), ", got ",
         argument.tensor.size(dim), " (shape ", shape_text(argument.tensor), ")");
  }
}

}  // namespace

std::string shape_text(const Tensor& tensor) {
  std::string text;
  for (std::int64_t d = 0; d < tensor.dim(); ++d) {
    text += join(d == 0 ? "" : ", ", tensor.size(d));
  }
  return join("[", text, "]");
}

void rank(const char* op, Named argument, std::int64_t expected, const char* layout) {
  if (argument.tensor.dim() != expected) {
    fail(op, argument.name, " must have ", expected, " dimensions ", layout, ", got shape ",
         shape_text(argument.tensor));
  }
}

void floating(const char* op, Named argument) {
  const ScalarType type = argument.tensor.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16 && type != ScalarType::Float) {
    fail(op, argument.name, " must be float16, bfloat16 or float32, got ", dtype_text(type));
  }
}

void unit_last_stride(const char* op, Named argument) {
  const Tensor& t = argument.tensor;
  if (t.numel() > 0 && t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1) {
    fail(op, argument.name, " must have a last stride of 1, got ", t.stride(t.dim() - 1), "; call .contiguous() first");
  }
}

void same_dtype(const char* op, Named expected, Named argument) {
  if (argument.tensor.scalar_type() != expected.tensor.scalar_type()) {
    fail(op, argument.name, " must have ", expected.name, "'s dtype ", dtype_text(expected.tensor.scalar_type()),
         ", got ", dtype_text(argument.tensor.scalar_type()));
  }
}

void share(const char* op, const char* name, double value) {
  if (!(value > 0.0 && value <= 1.0)) {
    fail(op, name, " must be in (0, 1], got ", value);
  }
}

void query(const char* op, const Tensor& q) { attention_tensor(op, {"q", q}, "[B, Hq, N, D]"); }

AttentionSizes attention_inputs(const char* op, const Tensor& q, Named k, std::optional<Named> v) {
  query(op, q);
  const Named query_argument{"q", q};
  attention_tensor(op, k, "[B, Hkv, N, D]");
  same_device(op, q, k);
  same_dtype(op, query_argument, k);
  same_size(op, query_argument, k, 0, "batch size");
  same_size(op, query_argument, k, 3, "head dim");
  heads_divide(op, k.name, k.tensor.size(1), q.size(1));
  if (v) {
    kv_pair(op, k, *v);
  }
  return {q.size(0), q.size(1), k.tensor.size(1), q.size(2), k.tensor.size(2), q.size(3)};
}

void heads_divide(const char* op, const char* kv, std::int64_t kv_heads, std::int64_t query_heads) {
  if (query_heads < 1 || kv_heads < 1 || query_heads % kv_heads != 0) {
    fail(op, kv, " has ", kv_heads, " heads, which does not divide q's ", query_heads, " query heads");
  }
}

void query_tokens(const char* op, const Tensor& q, std::int64_t expected) {
  if (q.size(2) != expected) {
    fail(op, "q must have ", expected, " tokens, got ", q.size(2), " (shape ", shape_text(q), ")");
  }
}

void last_tokens(const char* op, Named rows, std::int64_t dim, std::int64_t tokens, bool causal) {
  const std::int64_t queries = rows.tensor.size(dim);
  if (queries > tokens) {
    fail(op, rows.name, " must have at most k's ", tokens, " tokens, of which they are the last, got ", queries,
         " (shape ", shape_text(rows.tensor), ")");
  }
  if (queries < tokens && !causal) {
    fail(op, rows.name, " must have all of k's ", tokens, " tokens without causal, got ", queries, " and causal=False");
  }
}

void neighbourhood(const char* op, std::int64_t local_window, std::int64_t num_sinks) {
  not_negative(op, {{"local_window", local_window}, {"num_sinks", num_sinks}});
  if (num_sinks > 0 && local_window == 0) {
    fail(op, "num_sinks needs local_window above 0, got num_sinks ", num_sinks, " and local_window 0");
  }
}

void needs_causal(const char* op, bool causal, std::int64_t local_window) {
  if (local_window > 0 && !causal) {
    fail(op, "local_window needs causal=True, got local_window ", local_window, " and causal=False");
  }
}

void last_key(const char* op, const std::optional<Tensor>& last_key, const Tensor& like, std::int64_t batch,
              std::int64_t queries, bool causal) {
  if (!last_key) {
    return;
  }
  const Named argument{"last_key", *last_key};
  if (!causal) {
    fail(op, "last_key needs causal=True, got a tensor and causal=False");
  }
  dtype(op, argument, ScalarType::Int);
  shape(op, argument, {batch, queries});
  same_device(op, like, argument);
}

void kv_pair(const char* op, Named k, Named v) {
  attention_tensor(op, k, "[B, Hkv, N, D]");
  attention_tensor(op, v, "[B, Hkv, N, D]");
  same_device(op, k.tensor, v);
  same_dtype(op, k, v);
  constexpr const char* kDims[] = {"batch size", "heads", "tokens", "head dim"};
  for (std::int64_t d = 0; d < 4; ++d) {
    same_size(op, k, v, d, kDims[d]);
  }
}

void selection(const char* op, const Tensor& like, const Tensor& index, const Tensor& count, std::int64_t batch,
               std::int64_t tokens) {
  dtype(op, {"index", index}, ScalarType::Int);
  shape(op, {"index", index}, {batch, tokens});
  same_device(op, like, {"index", index});
  int_vector(op, like, {"count", count}, batch);
}

void int_vector(const char* op, const Tensor& like, Named argument, std::int64_t size) {
  dtype(op, argument, ScalarType::Int);
  shape(op, argument, {size});
  same_device(op, like, argument);
}

void scores(const char* op, const Tensor& budget_score, const Tensor& rank_score) {
  dtype(op, {"budget_score", budget_score}, ScalarType::Float);
  rank(op, {"budget_score", budget_score}, 2, "[B, N]");
  dtype(op, {"rank_score", rank_score}, ScalarType::Float);
  shape(op, {"rank_score", rank_score}, {budget_score.size(0), budget_score.size(1)});
  same_device(op, budget_score, {"rank_score", rank_score});
}

void budget(const char* op, double tau, std::optional<double> ratio, std::int64_t min_tokens) {
  share(op, "tau", tau);
  if (ratio) {
    share(op, "ratio", *ratio);
  }
  not_negative(op, {{"min_tokens", min_tokens}});
}

void linear(const char* op, Named x, Named weight) {
  rank(op, x, 3, "[B, N, C]");
  floating(op, x);
  unit_last_stride(op, x);
  rank(op, weight, 2, "[outputs, C]");
  same_device(op, x.tensor, weight);
  same_dtype(op, x, weight);
  shape(op, weight, {weight.tensor.size(0), x.tensor.size(2)});
}

void query_projection(const char* op, const QueryProjection& given) {
  const Tensor &x = given.x.tensor, &weight = given.weight.tensor;
  rank(op, given.cos, 3, "[B or 1, N, D]");
  const std::int64_t head_dim = given.cos.tensor.size(2);
  if (head_dim < 2 || head_dim % 2 != 0 || weight.size(0) % head_dim != 0 || weight.size(0) == 0) {
    fail(op, given.cos.name, " must have an even head dim that divides ", given.weight.name, "'s ", weight.size(0),
         " outputs, got ", head_dim);
  }
  for (const Named& table : {given.cos, given.sin}) {
    rank(op, table, 3, "[B or 1, N, D]");
    shape(op, table, {table.tensor.size(0) == 1 ? 1 : x.size(0), x.size(1), head_dim});
    unit_last_stride(op, table);
    same_device(op, x, table);
    same_dtype(op, given.x, table);
  }
  const auto vector = [&](const char* name, const std::optional<Tensor>& argument, std::int64_t size) {
    if (argument) {
      shape(op, {name, *argument}, {size});
      same_device(op, x, {name, *argument});
      same_dtype(op, given.x, {name, *argument});
    }
  };
  vector(given.bias_name, given.bias, weight.size(0));
  vector(given.norm_weight_name, given.norm_weight, head_dim);
  if (!(given.norm_eps >= 0.0)) {
    fail(op, given.norm_eps_name, " must be at least 0, got ", given.norm_eps);
  }
}

void mask(const char* op, const char* name, const std::optional<Tensor>& mask, const Tensor& like, std::int64_t batch,
          std::int64_t tokens) {
  if (!mask) {
    return;
  }
  dtype(op, {name, *mask}, ScalarType::Bool);
  shape(op, {name, *mask}, {batch, tokens});
  same_device(op, like, {name, *mask});
}

void shape(const char* op, Named argument, std::initializer_list<std::int64_t> expected) {
  bool equal = argument.tensor.dim() == static_cast<std::int64_t>(expected.size());
  std::int64_t d = 0;
  for (const std::int64_t size : expected) {
    equal = equal && argument.tensor.size(d) == size;
    ++d;
  }
  if (!equal) {
    std::string text;
    for (const std::int64_t size : expected) {
      text += join(text.empty() ? "" : ", ", size);
    }
    fail(op, argument.name, " must have shape [", text, "], got ", shape_text(argument.tensor));
  }
}

void dtype(const char* op, Named argument, ScalarType expected) {
  if (argument.tensor.scalar_type() != expected) {
    fail(op, argument.name, " must have dtype ", dtype_text(expected), ", got ",
         dtype_text(argument.tensor.scalar_type()));
  }
}

void same_device(const char* op, const Tensor& like, Named argument) {
  if (argument.tensor.device().type() != like.device().type() ||
      argument.tensor.get_device_index() != like.get_device_index()) {
    fail(op, argument.name, " must be on ", device_text(like), " like the other tensors, got ",
         device_text(argument.tensor));
  }
}

void not_negative(const char* op, std::initializer_list<std::pair<const char*, std::int64_t>> arguments) {
  for (const auto& [name, value] : arguments) {
    if (value < 0) {
      fail(op, name, " must be at least 0, got ", value);
    }
  }
}

void probe_counts(const char* op, std::int64_t num_recent, std::int64_t num_random, std::int64_t seed) {
  not_negative(op, {{"num_recent", num_recent}, {"num_random", num_random}, {"seed", seed}});
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (num_recent > kMax || num_random > kMax || num_recent + num_random > kMax) {
    fail(op, "num_recent + num_random must be below 2**31, got ", num_recent, " and ", num_random);
  }
  if (num_recent + num_random == 0) {
    fail(op, "num_recent + num_random must be at least 1, got 0");
  }
}

void scale(const char* op, std::optional<double> value) {
  if (value && !std::isfinite(*value)) {
    fail(op, "scale must be finite, got ", *value);
  }
}

quantized::Bits bits(const char* op, const char* name, const std::vector<std::int64_t>& given) {
  for (const quantized::Bits& bits : quantized::kSupportedBits) {
    if (given == std::vector<std::int64_t>{bits.keys, bits.values}) {
      return bits;
    }
  }
  std::string text;
  for (const std::int64_t bits : given) {
    text += join(text.empty() ? "" : ", ", bits);
  }
  const bool same = given.size() == 2 && given[0] == given[1];
  fail(op, name, " must be 2, 4 or 8, or [4, 2] of keys and values, got ",
       same ? join(given[0]) : join("[", text, "]"));
}

void quantized_head_dim(const char* op, Named argument) {
  const std::int64_t head_dim = argument.tensor.size(3);
  if (head_dim % quantized::kChannelMultiple != 0) {
    fail(op, argument.name, " must have a head dim that is a multiple of ", quantized::kChannelMultiple, ", got ",
         head_dim);
  }
}

void value_factor(const char* op, const Tensor& v_factor, const Tensor& like, std::int64_t kv_heads) {
  const Named argument{"v_factor", v_factor};
  dtype(op, argument, ScalarType::Float);
  shape(op, argument, {like.size(0), kv_heads, like.size(3)});
  same_device(op, like, argument);
}

}  // namespace zipvl::checks
