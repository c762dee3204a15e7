// The kernels of quantize_kv on a CPU: the bytes of every block, which csrc/common/quantized_block.h fixes to the last
// bit, the blocks in use and the channels' factors.
//
//   quantize_kv CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "cuda/quantize_kv/params.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <memory>
#include <optional>

#include "common/quantized_block.h"
#include "cuda_on_cpu.h"
#include "reference.h"

namespace zipvl::cuda {
namespace {
alignas(1024) thread_local unsigned char shared[emulated::kSharedBytes];
const emulated::DynamicShared registered(shared);
}  // namespace
}  // namespace zipvl::cuda
#include "cuda/quantize_kv/quantize_kv.cu"

namespace {

using namespace zipvl;
using namespace zipvl::cuda;
using emulated::uniform;
using Bytes = std::vector<std::uint8_t>;

struct Case {
  int batch, heads, tokens, head_dim;
  quantized::Bits bits[2];
  bool masked;
};

Case random_case() {
  const int head_dims[] = {32, 64, 96, 160};
  const auto any_bits = [] { return quantized::kSupportedBits[uniform(0, std::size(quantized::kSupportedBits) - 1)]; };
  return {uniform(1, 2),
          uniform(1, 2),
          uniform(1, uniform(0, 3) == 0 ? 1500 : 300),
          head_dims[uniform(0, 3)],
          {any_bits(), any_bits()},
          uniform(0, 1) == 0};
}

// A block of rows `keys` and `values` [tokens][head_dim]; what has no token is 0.
template <typename Element>
Bytes block_of(const std::vector<std::vector<float>>& keys, std::vector<std::vector<float>> values, const float* factor,
               int head_dim, quantized::Bits bits) {
  const auto layout = quantized::block_layout(head_dim, bits, sizeof(Element));
  Bytes bytes(layout.bytes, 0);
  const auto tokens = static_cast<std::int32_t>(keys.size());
  std::memcpy(bytes.data(), &tokens, sizeof tokens);
  const auto range = [&](const std::vector<float>& column, int width, std::size_t scale_at, std::size_t zero_at) {
    const auto [least, most] = std::minmax_element(column.begin(), column.end());
    const Element scale(quantized::step_of(*least, *most, width)), zero(*least);
    std::memcpy(&bytes[scale_at], &scale, sizeof scale);
    std::memcpy(&bytes[zero_at], &zero, sizeof zero);
    return std::pair(static_cast<float>(scale), static_cast<float>(zero));
  };
  for (int d = 0; d < head_dim; ++d) {
    std::vector<float> column;
    for (const std::vector<float>& key : keys) {
      column.push_back(key[d]);
    }
    const std::size_t place = quantized::parameter_place(d) * sizeof(Element);
    const auto [scale, zero] = range(column, bits.keys, layout.k_scale + place, layout.k_zero + place);
    for (int t = 0; t < tokens; ++t) {
      emulated::put_code(&bytes[layout.k_codes], quantized::key_code_place(bits.keys, t, d),
                         quantized::code_of(column[t], scale, zero, bits.keys), bits.keys);
    }
  }
  for (int t = 0; t < tokens; ++t) {
    for (int d = 0; d < head_dim; ++d) {
      values[t][d] /= factor[d];
    }
    const auto [scale, zero] =
        range(values[t], bits.values, layout.v_scale + t * sizeof(Element), layout.v_zero + t * sizeof(Element));
    for (int d = 0; d < head_dim; ++d) {
      emulated::put_code(&bytes[layout.v_codes], quantized::value_code_place(bits.values, t, d),
                         quantized::code_of(values[t][d], scale, zero, bits.values), bits.values);
    }
  }
  return bytes;
}

template <typename Element>
bool run(const Case& c, std::optional<cuda::Element> element) {
  const std::size_t rows = static_cast<std::size_t>(c.batch) * c.heads * c.tokens;
  std::vector<Element> k(rows * c.head_dim), v(k.size());
  emulated::fill_normal(k);
  emulated::fill_normal(v);
  std::unique_ptr<bool[]> mask(new bool[c.batch * c.tokens]);
  std::vector<std::int32_t> index(c.batch * c.tokens, c.tokens), count(c.batch, 0);
  std::vector<std::vector<int>> parts[2];
  for (int b = 0; b < c.batch; ++b) {
    std::vector<int> selected, others;
    for (int n = 0; n < c.tokens; ++n) {
      mask[b * c.tokens + n] = !c.masked || uniform(0, 4) != 0;
      if (mask[b * c.tokens + n]) {
        (uniform(0, 3) == 0 ? selected : others).push_back(n);
      }
    }
    std::copy(selected.begin(), selected.end(), &index[b * c.tokens]);
    count[b] = static_cast<std::int32_t>(selected.size());
    parts[0].push_back(selected);
    parts[1].push_back(others);
  }

  QuantizeKvParams params{};
  params.batch = c.batch;
  params.heads = c.heads;
  params.tokens = c.tokens;
  params.head_dim = c.head_dim;
  params.capacity = quantized::block_capacity(c.tokens);
  params.chunks = (c.tokens + kSplitChunk - 1) / kSplitChunk;
  params.element = element;
  Bytes packed[2];
  std::vector<std::int32_t> blocks[2];
  std::int64_t block_bytes[2];
  for (int s = 0; s < 2; ++s) {
    params.bits[s] = c.bits[s];
    block_bytes[s] = quantized::block_layout(c.head_dim, c.bits[s], sizeof(Element)).bytes;
    packed[s].assign(c.batch * c.heads * params.capacity * block_bytes[s], 0);
    blocks[s].assign(c.batch, -7);
    params.packed[s] = packed[s].data();
    params.blocks[s] = blocks[s].data();
  }
  std::vector<float> factor(c.batch * c.heads * c.head_dim, NAN);
  std::vector<std::uint32_t> largest(factor.size(), 0);
  std::vector<std::int32_t> chunk_rest(c.batch * params.chunks, -7), rest(c.batch * c.tokens, -7),
      rest_count(c.batch, -7);
  params.k = k.data();
  params.v = v.data();
  for (auto* strides : {params.k_stride, params.v_stride}) {
    strides[2] = c.head_dim;
    strides[1] = std::int64_t{c.tokens} * c.head_dim;
    strides[0] = c.heads * strides[1];
  }
  params.index = index.data();
  params.index_stride[0] = params.mask_stride[0] = c.tokens;
  params.index_stride[1] = params.mask_stride[1] = params.count_stride = 1;
  params.count = count.data();
  params.token_mask = c.masked ? mask.get() : nullptr;
  params.v_factor = factor.data();
  params.largest = largest.data();
  params.chunk_rest = chunk_rest.data();
  params.rest = rest.data();
  params.rest_count = rest_count.data();
  launch_quantize_kv(params, nullptr);

  bool right = true;
  for (int head = 0; head < c.batch * c.heads; ++head) {
    const int b = head / c.heads;
    const auto row = [&](const std::vector<Element>& x, int n) {
      std::vector<float> values;
      for (int d = 0; d < c.head_dim; ++d) {
        values.push_back(static_cast<float>(x[(static_cast<std::size_t>(head) * c.tokens + n) * c.head_dim + d]));
      }
      return values;
    };
    std::vector<float> most(c.head_dim, 0.0F);
    for (int n = 0; n < c.tokens; ++n) {
      const std::vector<float> values = row(v, n);
      for (int d = 0; d < c.head_dim && mask[b * c.tokens + n]; ++d) {
        most[d] = std::max(most[d], std::fabs(values[d]));
      }
    }
    const float* own = &factor[static_cast<std::size_t>(head) * c.head_dim];
    for (int d = 0; d < c.head_dim; ++d) {
      right = right && own[d] == quantized::channel_factor(most[d]);
    }
    for (int s = 0; s < 2; ++s) {
      const std::vector<int>& positions = parts[s][b];
      const std::size_t used = (positions.size() + quantized::kBlockTokens - 1) / quantized::kBlockTokens;
      right = right && blocks[s][b] == static_cast<int>(used);
      for (std::size_t block = 0; block < used; ++block) {
        std::vector<std::vector<float>> keys, values;
        for (std::size_t i = block * quantized::kBlockTokens;
             i < std::min(positions.size(), (block + 1) * quantized::kBlockTokens); ++i) {
          keys.push_back(row(k, positions[i]));
          values.push_back(row(v, positions[i]));
        }
        const Bytes should = block_of<Element>(keys, values, own, c.head_dim, c.bits[s]);
        right = right &&
                std::equal(should.begin(), should.end(), &packed[s][(head * params.capacity + block) * block_bytes[s]]);
      }
    }
  }
  return right;
}

}  // namespace

// What the launches ask of the device.
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
namespace zipvl::cuda {
bool runs_hopper_code(int /*device*/) { return false; }
}  // namespace zipvl::cuda

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    const auto check = [&](const char* name, const Case& c, bool right) {
      report(right, "%s batch %d heads %d tokens %4d channels %3d bits %d/%d %d/%d%s", name, c.batch, c.heads, c.tokens,
             c.head_dim, c.bits[0].keys, c.bits[0].values, c.bits[1].keys, c.bits[1].values, c.masked ? " masked" : "");
    };
    Case c = random_case();
    check("fp16", c, run<__half>(c, Element::kFloat16));
    c = random_case();
    check("bf16", c, run<__nv_bfloat16>(c, Element::kBFloat16));
    c = random_case();
    check("fp32", c, run<float>(c, std::nullopt));
  });
}
