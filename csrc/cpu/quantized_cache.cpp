// Quantising keys and values into the blocks of common/quantized_block.h and back, by loops over memory.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/quantized_block.h"
#include "cpu/cpu.h"

namespace zipvl::cpu {
namespace {

using quantized::Bits;
using quantized::BlockLayout;
using quantized::CodePlace;
using quantized::kBlockTokens;
using torch::headeronly::ScalarType;
using Sizes = std::vector<std::int64_t>;

Tensor zeros(const Sizes& sizes, ScalarType dtype) { return torch::stable::full(sizes, 0.0, dtype); }

// Calls body with a value of the tensor's element type.
template <typename Body>
void with_element(const Tensor& like, const Body& body) {
  switch (like.scalar_type()) {
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      return body(float{});
  }
}

template <typename Value>
Value load(const std::uint8_t* from) {
  Value value;
  std::memcpy(&value, from, sizeof(Value));
  return value;
}

template <typename Value>
void store(std::uint8_t* to, Value value) {
  std::memcpy(to, &value, sizeof(Value));
}

// Element `place` of a parameter array, as float32.
template <typename Element>
float parameter(const std::uint8_t* array, int place) {
  return static_cast<float>(load<Element>(array + place * static_cast<int>(sizeof(Element))));
}

void put_code(std::uint8_t* codes, CodePlace place, std::uint32_t code) {
  std::uint8_t* at = codes + 4 * place.word;
  store(at, load<std::uint32_t>(at) | (code << place.shift));
}

void put_code(std::uint8_t* codes, CodePlace place, std::uint32_t code, int bits) {
  if (bits == 8) {
    put_code(codes, place, code & 15);
    place.word += quantized::kUpperHalf;
    code >>= 4;
  }
  put_code(codes, place, code);
}

float get_code(const std::uint8_t* codes, CodePlace place, int bits) {
  const auto part = [&](int word) {
    return (load<std::uint32_t>(codes + 4 * word) >> place.shift) & ((1U << place.width) - 1U);
  };
  return static_cast<float>(part(place.word) + (bits == 8 ? part(place.word + quantized::kUpperHalf) << 4 : 0));
}

// Scale and zero of `values`, rounded to Element and stored; returned as float32.
template <typename Element>
std::pair<float, float> put_range(const std::vector<float>& values, int bits, std::uint8_t* scale, std::uint8_t* zero) {
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  const auto rounded_scale = static_cast<Element>(quantized::step_of(*least, *most, bits));
  const auto rounded_zero = static_cast<Element>(*least);
  store(scale, rounded_scale);
  store(zero, rounded_zero);
  return {static_cast<float>(rounded_scale), static_cast<float>(rounded_zero)};
}

// One block of the tokens at `position`; k, v: rows of one head, strides in elements.
template <typename Element>
void pack_block(std::uint8_t* block, const Element* k, std::int64_t k_stride, const Element* v, std::int64_t v_stride,
                const float* factor, const std::vector<std::int64_t>& position, int head_dim, Bits bits) {
  const BlockLayout layout = quantized::block_layout(head_dim, bits, sizeof(Element));
  const int tokens = static_cast<int>(position.size());
  const auto element = static_cast<int>(sizeof(Element));
  store(block, static_cast<std::int32_t>(tokens));
  std::vector<float> values(position.size());
  for (int d = 0; d < head_dim; ++d) {
    for (std::size_t t = 0; t < values.size(); ++t) {
      values[t] = static_cast<float>(k[position[t] * k_stride + d]);
    }
    const int at = quantized::parameter_place(d) * element;
    const auto [scale, zero] =
        put_range<Element>(values, bits.keys, block + layout.k_scale + at, block + layout.k_zero + at);
    for (int t = 0; t < tokens; ++t) {
      put_code(block + layout.k_codes, quantized::key_code_place(bits.keys, t, d),
               quantized::code_of(values[static_cast<std::size_t>(t)], scale, zero, bits.keys), bits.keys);
    }
  }
  values.resize(static_cast<std::size_t>(head_dim));
  for (int t = 0; t < tokens; ++t) {
    const Element* row = v + position[static_cast<std::size_t>(t)] * v_stride;
    for (int d = 0; d < head_dim; ++d) {
      values[static_cast<std::size_t>(d)] = static_cast<float>(row[d]) / factor[d];
    }
    const auto [scale, zero] = put_range<Element>(values, bits.values, block + layout.v_scale + t * element,
                                                  block + layout.v_zero + t * element);
    for (int d = 0; d < head_dim; ++d) {
      put_code(block + layout.v_codes, quantized::value_code_place(bits.values, t, d),
               quantized::code_of(values[static_cast<std::size_t>(d)], scale, zero, bits.values), bits.values);
    }
  }
}

// Row b's positions of T, and its other real tokens, each ascending.
struct Parts {
  std::vector<std::int64_t> high, low;
};
Parts split_tokens(const Tensor& index, const Tensor& count, const std::optional<Tensor>& token_mask, std::int64_t b) {
  const std::int64_t tokens = index.size(1);
  const std::int32_t* entries = index.const_data_ptr<std::int32_t>() + b * index.stride(0);
  const std::int64_t given = count.const_data_ptr<std::int32_t>()[b * count.stride(0)];
  const bool* real = token_mask ? token_mask->const_data_ptr<bool>() + b * token_mask->stride(0) : nullptr;
  Parts parts;
  std::vector<bool> taken(static_cast<std::size_t>(tokens), false);
  for (std::int64_t s = 0; s < std::clamp<std::int64_t>(given, 0, tokens); ++s) {
    const std::int64_t position = entries[s * index.stride(1)];
    if (position >= 0 && position < tokens) {
      parts.high.push_back(position);
      taken[static_cast<std::size_t>(position)] = true;
    }
  }
  for (std::int64_t n = 0; n < tokens; ++n) {
    if (!taken[static_cast<std::size_t>(n)] && (real == nullptr || real[n * token_mask->stride(1)])) {
      parts.low.push_back(n);
    }
  }
  return parts;
}

template <typename Element>
const Element* head_of(const Tensor& x, std::int64_t b, std::int64_t h) {
  return static_cast<const Element*>(x.const_data_ptr()) + b * x.stride(0) + h * x.stride(1);
}

template <typename Element>
void put_factor(float* factor, const Element* v, std::int64_t stride, const Parts& parts, std::int64_t head_dim) {
  std::vector<float> largest(static_cast<std::size_t>(head_dim), 0.0F);
  for (const auto* part : {&parts.high, &parts.low}) {
    for (const std::int64_t n : *part) {
      for (std::int64_t d = 0; d < head_dim; ++d) {
        float& most = largest[static_cast<std::size_t>(d)];
        most = std::max(most, std::fabs(static_cast<float>(v[n * stride + d])));
      }
    }
  }
  std::transform(largest.begin(), largest.end(), factor, quantized::channel_factor);
}

// Packs `positions` of one head into consecutive blocks.
template <typename Element>
void pack_head(std::uint8_t* blocks, std::int64_t bytes, const Tensor& k, const Tensor& v, const float* factor,
               std::int64_t b, std::int64_t h, const std::vector<std::int64_t>& positions, Bits bits) {
  for (std::size_t first = 0; first < positions.size(); first += kBlockTokens, blocks += bytes) {
    const std::size_t end = std::min(first + kBlockTokens, positions.size());
    const std::vector<std::int64_t> part(positions.begin() + static_cast<std::ptrdiff_t>(first),
                                         positions.begin() + static_cast<std::ptrdiff_t>(end));
    pack_block(blocks, head_of<Element>(k, b, h), k.stride(2), head_of<Element>(v, b, h), v.stride(2), factor, part,
               static_cast<int>(k.size(3)), bits);
  }
}

std::int64_t blocks_of(std::int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

const std::uint8_t* block_at(const Segment& segment, std::int64_t b, std::int64_t h, std::int64_t block) {
  return static_cast<const std::uint8_t*>(segment.packed.const_data_ptr()) + b * segment.packed.stride(0) +
         h * segment.packed.stride(1) + block * segment.packed.stride(2);
}

std::int64_t used_blocks(const Segment& segment, std::int64_t b) {
  const std::int64_t given = segment.blocks.const_data_ptr<std::int32_t>()[b * segment.blocks.stride(0)];
  return std::clamp<std::int64_t>(given, 0, segment.packed.size(2));
}

int block_tokens(const std::uint8_t* block) { return std::clamp<int>(load<std::int32_t>(block), 0, kBlockTokens); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, Bits high_bits, Bits low_bits,
                                                               const OptionalTensor& v_factor,
                                                               const OptionalTensor& token_mask) {
  const std::int64_t batch = k.size(0), heads = k.size(1), tokens = k.size(2), head_dim = k.size(3);
  const Tensor factor = zeros({batch, heads, head_dim}, ScalarType::Float);
  if (v_factor) {
    torch::stable::copy_(const_cast<Tensor&>(factor), *v_factor);
  }
  const Tensor high_blocks = zeros({batch}, ScalarType::Int), low_blocks = zeros({batch}, ScalarType::Int);
  Tensor high, low;
  with_element(k, [&]<typename Element>(Element) {
    const std::int64_t high_bytes = quantized::block_layout(head_dim, high_bits, sizeof(Element)).bytes;
    const std::int64_t low_bytes = quantized::block_layout(head_dim, low_bits, sizeof(Element)).bytes;
    const std::int64_t capacity = quantized::block_capacity(tokens);
    high = zeros({batch, heads, capacity, high_bytes}, ScalarType::Byte);
    low = zeros({batch, heads, capacity, low_bytes}, ScalarType::Byte);
    auto* high_data = static_cast<std::uint8_t*>(high.mutable_data_ptr());
    auto* low_data = static_cast<std::uint8_t*>(low.mutable_data_ptr());
    float* factor_data = factor.mutable_data_ptr<float>();
    for (std::int64_t b = 0; b < batch; ++b) {
      const Parts parts = split_tokens(index, count, token_mask, b);
      high_blocks.mutable_data_ptr<std::int32_t>()[b] =
          static_cast<std::int32_t>(blocks_of(static_cast<std::int64_t>(parts.high.size())));
      low_blocks.mutable_data_ptr<std::int32_t>()[b] =
          static_cast<std::int32_t>(blocks_of(static_cast<std::int64_t>(parts.low.size())));
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t head = b * heads + h;
        float* head_factor = factor_data + head * head_dim;
        if (!v_factor) {
          put_factor(head_factor, head_of<Element>(v, b, h), v.stride(2), parts, head_dim);
        }
        pack_head<Element>(high_data + head * capacity * high_bytes, high_bytes, k, v, head_factor, b, h, parts.high,
                           high_bits);
        pack_head<Element>(low_data + head * capacity * low_bytes, low_bytes, k, v, head_factor, b, h, parts.low,
                           low_bits);
      }
    }
  });
  return {high, high_blocks, low, low_blocks, factor};
}

std::int64_t segment_tokens(const Segment& segment, std::int64_t b) {
  std::int64_t tokens = 0;
  for (std::int64_t block = 0; block < used_blocks(segment, b); ++block) {
    tokens += block_tokens(block_at(segment, b, 0, block));
  }
  return tokens;
}

void dequantize(const Segment& segment, std::int64_t b, const Tensor& v_factor, const Tensor& like, const Tensor& k,
                const Tensor& v, std::int64_t first) {
  const std::int64_t heads = k.size(0), rows = k.size(1);
  const auto head_dim = static_cast<int>(k.size(2));
  with_element(like, [&]<typename Element>(Element) {
    const BlockLayout layout = quantized::block_layout(head_dim, segment.bits, sizeof(Element));
    for (std::int64_t h = 0; h < heads; ++h) {
      const float* factor = v_factor.const_data_ptr<float>() + b * v_factor.stride(0) + h * v_factor.stride(1);
      std::int64_t row = h * rows + first;
      for (std::int64_t n = 0; n < used_blocks(segment, b); ++n) {
        const std::uint8_t* block = block_at(segment, b, h, n);
        // Every head holds the same tokens; the first head's count decides, so that no row is written twice.
        const int tokens = block_tokens(block_at(segment, b, 0, n));
        for (int t = 0; t < tokens; ++t, ++row) {
          const float v_scale = parameter<Element>(block + layout.v_scale, t);
          const float v_zero = parameter<Element>(block + layout.v_zero, t);
          float* k_row = k.mutable_data_ptr<float>() + row * head_dim;
          float* v_row = v.mutable_data_ptr<float>() + row * head_dim;
          for (int d = 0; d < head_dim; ++d) {
            const int place = quantized::parameter_place(d);
            k_row[d] = parameter<Element>(block + layout.k_scale, place) *
                           get_code(block + layout.k_codes, quantized::key_code_place(segment.bits.keys, t, d),
                                    segment.bits.keys) +
                       parameter<Element>(block + layout.k_zero, place);
            v_row[d] =
                factor[d * v_factor.stride(2)] *
                (v_scale * get_code(block + layout.v_codes, quantized::value_code_place(segment.bits.values, t, d),
                                    segment.bits.values) +
                 v_zero);
          }
        }
      }
    }
  });
}

}  // namespace zipvl::cpu
