// The kernels of decode_attn and decode_attn_quantized on a CPU, against float64 over what the cache holds: random
// lengths, ragged batches, groups of query heads; slots past the lengths hold NaN.
//
//   decode_attn CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "cuda/decode_attn/plan.h"
#include "cuda/decode_attn/sm80/launch.cuh"
#include "cuda_on_cpu.h"
#include "reference.h"

namespace zipvl::cuda::decode_attn::sm80 {
alignas(1024) thread_local unsigned char shared[emulated::kSharedBytes];
const emulated::DynamicShared registered(shared);
}  // namespace zipvl::cuda::decode_attn::sm80

// What the launches ask of the device.
namespace zipvl::cuda {
bool runs_hopper_code(int /*device*/) { return false; }
}  // namespace zipvl::cuda

namespace {

using namespace zipvl;
using namespace zipvl::cuda;
using emulated::difference;
using emulated::normal;
using emulated::uniform;

using Rows = std::vector<std::vector<double>>;

struct Shape {
  int batch, query_heads, kv_heads, num_sms;
  int items() const { return batch * kv_heads; }
  int group() const { return query_heads / kv_heads; }
};

Shape random_shape() {
  const int kv_heads = uniform(1, 4), batch = uniform(0, 4) == 0 ? uniform(5, 40) : uniform(1, 4);
  const int groups[] = {1, 2, 3, 7, 8, 9, 16};
  return {batch, kv_heads * groups[uniform(0, 6)], kv_heads, uniform(1, 40)};
}

// Lengths of a batch: all equal, or any, some of them 0.
std::vector<std::int32_t> random_lengths(int batch, int most) {
  std::vector<std::int32_t> lengths(batch, uniform(0, 3) == 0 ? uniform(0, most) : most);
  if (uniform(0, 1) == 1) {
    for (std::int32_t& length : lengths) {
      length = uniform(0, 3) == 0 ? 0 : uniform(std::min(1, most), most);
    }
  }
  return lengths;
}

// Rows [batch, kv_heads, slots, D]; NaN from each batch row's length on.
template <typename Element, int D>
std::vector<Element> random_rows(const Shape& shape, int slots, const std::vector<std::int32_t>& lengths) {
  std::vector<Element> rows(static_cast<std::size_t>(shape.items()) * slots * D);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const int slot = static_cast<int>(i / D % slots), b = static_cast<int>(i / D / slots / shape.kv_heads);
    rows[i] = Element(slot < lengths[b] ? normal() : NAN);
  }
  return rows;
}

template <typename Element>
std::vector<double> row_of(const std::vector<Element>& rows, std::size_t row, int D) {
  std::vector<double> values;
  for (int d = 0; d < D; ++d) {
    values.push_back(static_cast<float>(rows[row * D + d]));
  }
  return values;
}

// Queries, outputs and workspace of a launch; everything that kernels write is NaN before.
template <typename Element, int D>
struct Call {
  Shape shape;
  plan::DecodeAttnCudaPlan plan;
  std::vector<Element> q, out;
  std::vector<float> lse, partial_out, partial_lse;
  DecodeAttnParams params{};

  Call(const Shape& of, const plan::DecodeAttnCudaPlan& planned)
      : shape(of),
        plan(planned),
        q(shape.batch * shape.query_heads * D),
        out(q.size(), Element(NAN)),
        lse(shape.batch * shape.query_heads, NAN),
        partial_out(plan.partials * kDecodeHeads * D, NAN),
        partial_lse(plan.partials * kDecodeHeads, NAN) {
    emulated::fill_normal(q);
    params.q = q.data();
    params.q_stride[0] = shape.query_heads * D;
    params.q_stride[1] = D;
    params.out = out.data();
    params.lse = lse.data();
    params.partials = {partial_out.data(), partial_lse.data()};
    params.batch = shape.batch;
    params.query_heads = shape.query_heads;
    params.kv_heads = shape.kv_heads;
    params.head_dim = D;
    params.head_chunks = plan.head_chunks;
    params.blocks = plan.blocks;
    params.warps = plan.warps;
    params.shared_bytes = static_cast<int>(plan.shared_bytes);
    params.scale_log2 = 1.4426950408889634F / std::sqrt(static_cast<float>(D));
  }

  void set_cache(const std::vector<Element>& k, const std::vector<Element>& v, int slots,
                 const std::vector<std::int32_t>& lengths) {
    params.k = k.data();
    params.v = v.data();
    params.k_stride[0] = params.v_stride[0] = std::int64_t{shape.kv_heads} * slots * D;
    params.k_stride[1] = params.v_stride[1] = std::int64_t{slots} * D;
    params.k_stride[2] = params.v_stride[2] = D;
    params.lengths = lengths.data();
    params.lengths_stride = 1;
    params.slots = slots;
  }

  // tokens(b, h): keys and values of a key/value head.
  template <typename Tokens>
  double error(const Tokens& tokens) const {
    const auto starts_of = [](const Rows& rows) {
      std::vector<const double*> starts;
      for (const std::vector<double>& row : rows) {
        starts.push_back(row.data());
      }
      return starts;
    };
    const std::vector<double> wide_q = emulated::widened(q), wide_out = emulated::widened(out);
    double worst = 0.0;
    for (int b = 0; b < shape.batch; ++b) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        const auto [keys, values] = tokens(b, h);
        for (int g = 0; g < shape.group(); ++g) {
          const int head = b * shape.query_heads + h * shape.group() + g;
          const auto should = emulated::attend(&wide_q[head * D], D, starts_of(keys), starts_of(values));
          worst = std::max({worst, difference(&wide_out[head * D], should.out), difference(lse[head], should.lse)});
        }
      }
    }
    return worst;
  }
};

template <typename Element, int D>
double decode(const Shape& shape) {
  const int slots = uniform(1, 20) * uniform(1, 40);
  const std::vector<std::int32_t> lengths = random_lengths(shape.batch, slots);
  const auto k = random_rows<Element, D>(shape, slots, lengths), v = random_rows<Element, D>(shape, slots, lengths);
  Call<Element, D> call(shape, plan::plan_decode_attn_cuda({shape.batch, shape.query_heads, shape.kv_heads, D, slots,
                                                            true, true, shape.num_sms, emulated::kSharedBytes}));
  call.set_cache(k, v, slots, lengths);
  decode_attn::sm80::launch_decode_attn<Element, D>(call.params, nullptr);
  return call.error([&](int b, int h) {
    std::pair<Rows, Rows> tokens;
    for (int t = 0; t < lengths[b]; ++t) {
      const std::size_t row = (static_cast<std::size_t>(b) * shape.kv_heads + h) * slots + t;
      tokens.first.push_back(row_of(k, row, D));
      tokens.second.push_back(row_of(v, row, D));
    }
    return tokens;
  });
}

// One segment: random codes and parameters, and what they stand for. Blocks past the used ones are all ones, as is
// what a block holds of tokens past its count.
template <typename Element, int D>
struct Segment {
  quantized::Bits bits;
  int capacity;
  std::vector<std::int32_t> used;
  std::vector<std::uint8_t> bytes;
  std::vector<std::pair<Rows, Rows>> tokens;  // of each key/value head, values not yet times the channels' factor

  Segment(const Shape& shape, quantized::Bits width)
      : bits(width), capacity(uniform(1, 12)), used(random_lengths(shape.batch, capacity)), tokens(shape.items()) {
    const auto layout = quantized::block_layout(D, bits, 2);
    bytes.assign(shape.items() * capacity * layout.bytes, 0xFF);
    for (int item = 0; item < shape.items(); ++item) {
      for (int block = 0; block < used[item / shape.kv_heads]; ++block) {
        fill(&bytes[(item * capacity + block) * layout.bytes], layout, tokens[item]);
      }
    }
  }

  QuantizedSegment params(const Shape& shape) const {
    const std::int64_t block = quantized::block_layout(D, bits, 2).bytes;
    return {bytes.data(), used.data(), {shape.kv_heads * capacity * block, capacity * block, block}, 1, capacity, bits};
  }

 private:
  void fill(std::uint8_t* block, const quantized::BlockLayout& layout, std::pair<Rows, Rows>& held) const {
    const std::int32_t count = uniform(0, 1) == 0 ? quantized::kBlockTokens : uniform(1, quantized::kBlockTokens);
    std::memset(block, 0, quantized::kHeaderBytes);
    std::memcpy(block, &count, sizeof count);
    const auto step_of = [](int width) { return 3.0F / static_cast<float>((1 << width) - 1); };
    const float key_step = step_of(bits.keys), value_step = step_of(bits.values);
    const auto put = [&](std::int64_t at, int i, float x) {
      const Element element(x);
      std::memcpy(block + at + 2 * i, &element, 2);
      return static_cast<double>(static_cast<float>(element));
    };
    std::vector<double> scale, zero;
    for (int d = 0; d < D; ++d) {
      scale.push_back(put(layout.k_scale, quantized::parameter_place(d), key_step * (0.5F + 0.1F * uniform(0, 5))));
      zero.push_back(put(layout.k_zero, quantized::parameter_place(d), normal() - 1.5F));
    }
    for (int t = 0; t < quantized::kBlockTokens; ++t) {
      const double token_scale = put(layout.v_scale, t, value_step * (0.5F + 0.1F * uniform(0, 5)));
      const double token_zero = put(layout.v_zero, t, 0.3F * normal() - 1.5F);
      std::vector<double> key, value;
      for (int d = 0; d < D; ++d) {
        const auto k = static_cast<unsigned>(uniform(0, (1 << bits.keys) - 1));
        const auto v = static_cast<unsigned>(uniform(0, (1 << bits.values) - 1));
        emulated::put_code(block + layout.k_codes, quantized::key_code_place(bits.keys, t, d), k, bits.keys);
        emulated::put_code(block + layout.v_codes, quantized::value_code_place(bits.values, t, d), v, bits.values);
        key.push_back(scale[d] * k + zero[d]);
        value.push_back(token_scale * v + token_zero);
      }
      if (t < count) {
        held.first.push_back(key);
        held.second.push_back(value);
      }
    }
  }
};

template <typename Element, int D>
double decode_quantized(const Shape& shape) {
  const auto any_bits = [] { return quantized::kSupportedBits[uniform(0, std::size(quantized::kSupportedBits) - 1)]; };
  const Segment<Element, D> high(shape, any_bits()), low(shape, any_bits());
  const int slots = uniform(0, 2) == 0 ? 0 : uniform(1, 120);
  const std::vector<std::int32_t> lengths = random_lengths(shape.batch, slots);
  const auto k = random_rows<Element, D>(shape, std::max(slots, 1), lengths);
  const auto v = random_rows<Element, D>(shape, std::max(slots, 1), lengths);
  std::vector<float> factor(shape.items() * D);
  for (float& x : factor) {
    x = 0.5F + 0.1F * static_cast<float>(uniform(0, 10));
  }
  Call<Element, D> call(
      shape, plan::plan_decode_attn_quantized_cuda({shape.batch, shape.query_heads, shape.kv_heads, D, slots, true,
                                                    true, shape.num_sms, emulated::kSharedBytes},
                                                   {high.capacity, low.capacity, high.bits, low.bits}));
  if (slots > 0) {
    call.set_cache(k, v, slots, lengths);
  }
  DecodeAttnQuantizedParams params{};
  params.attn = call.params;
  params.segments[0] = high.params(shape);
  params.segments[1] = low.params(shape);
  params.v_factor = factor.data();
  params.v_factor_stride[0] = shape.kv_heads * D;
  params.v_factor_stride[1] = D;
  params.v_factor_stride[2] = 1;
  decode_attn::sm80::launch_decode_attn_quantized<Element, D>(params, nullptr);
  return call.error([&](int b, int h) {
    std::pair<Rows, Rows> tokens;
    const int item = b * shape.kv_heads + h;
    for (const auto* segment : {&high.tokens[item], &low.tokens[item]}) {
      tokens.first.insert(tokens.first.end(), segment->first.begin(), segment->first.end());
      for (std::vector<double> value : segment->second) {
        for (int d = 0; d < D; ++d) {
          value[d] *= factor[item * D + d];
        }
        tokens.second.push_back(value);
      }
    }
    for (int t = 0; t < (slots > 0 ? lengths[b] : 0); ++t) {
      tokens.first.push_back(row_of(k, static_cast<std::size_t>(item) * slots + t, D));
      tokens.second.push_back(row_of(v, static_cast<std::size_t>(item) * slots + t, D));
    }
    return tokens;
  });
}

}  // namespace

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    const auto check = [&](const char* name, const Shape& shape, double error, double most) {
      report(error <= most, "%-30s batch %2d heads %2d/%d num_sms %2d error %.5f", name, shape.batch, shape.query_heads,
             shape.kv_heads, shape.num_sms, error);
    };
    Shape shape = random_shape();
    check("decode_attn bf16 128", shape, decode<__nv_bfloat16, 128>(shape), 0.03);
    shape = random_shape();
    check("decode_attn fp16 64", shape, decode<__half, 64>(shape), 0.004);
    shape = random_shape();
    check("decode_attn_quantized bf16 128", shape, decode_quantized<__nv_bfloat16, 128>(shape), 0.1);
    shape = random_shape();
    check("decode_attn_quantized fp16 96", shape, decode_quantized<__half, 96>(shape), 0.01);
  });
}
