// The window's pass of Hopper's ranged attention (wgmma, TMA) on a CPU, behind row_ranges as the op launches it,
// against float64: outputs and log-sum-exp.
//
//   window_sm90 CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "attention_reference.h"
#include "cuda/sparse_attn/sm90/launch.cuh"
#include "cuda_on_cpu.h"
#include "hopper_host.h"

namespace zipvl::cuda::sparse_attn::sm90 {
alignas(1024) thread_local unsigned char shared_bytes[emulated::kSharedBytes];
const emulated::DynamicShared registered(shared_bytes);
}  // namespace zipvl::cuda::sparse_attn::sm90

namespace {

using namespace zipvl::cuda;

constexpr int kNumSms = 3;  // few, so that each has several tiles

struct WindowCase {
  int batch, query_heads, kv_heads, tokens, queries, window, sinks;
};

WindowCase random_window() {
  using emulated::uniform;
  const int kv_heads = uniform(1, 2), groups[] = {1, 3, 7}, windows[] = {1, 63, 64, 65, 127, 128, 129, 500};
  const int tokens = uniform(1, 450);
  return {uniform(1, 2),
          kv_heads * groups[uniform(0, 2)],
          kv_heads,
          tokens,
          uniform(0, 1) == 0 ? tokens : uniform(1, tokens),
          windows[uniform(0, 7)],
          uniform(0, 1) * uniform(1, 20)};
}

struct Errors {
  double out = 0.0, lse = 0.0;
};

template <typename Element, int D>
Errors errors_of(const WindowCase& c) {
  const std::size_t rows = static_cast<std::size_t>(c.batch) * c.queries;
  const auto q = emulated::random_rows<Element>(rows * c.query_heads, D);
  const std::size_t keys = static_cast<std::size_t>(c.batch) * c.tokens * c.kv_heads;
  const auto k = emulated::random_rows<Element>(keys, D), v = emulated::random_rows<Element>(keys, D);
  std::vector<Element> out(q.size(), Element(NAN));
  std::vector<float> lse(rows * c.query_heads, NAN);
  std::vector<int2> range(rows, int2{-7, -7});
  std::vector<int4> group(static_cast<std::size_t>(c.batch) * zipvl::ceil_div(c.queries, kRowGroup),
                          int4{-7, -7, -7, -7});

  RowRangesParams ranges{};
  ranges.pass[0].range = range.data();
  ranges.pass[0].group = group.data();
  ranges.pass[0].in_window = true;
  ranges.passes = 1;
  ranges.batch = c.batch;
  ranges.queries = c.queries;
  ranges.tokens = c.tokens;
  ranges.local_window = std::min(c.window, c.tokens);
  ranges.num_sinks = std::min(c.sinks, c.tokens);
  launch_row_ranges(ranges, nullptr);

  SparseAttnParams params{};
  params.q = q.data();
  params.k = k.data();
  params.v = v.data();
  params.out = out.data();
  const auto set = [&](std::int64_t (&strides)[3], int length, int heads) {
    strides[0] = std::int64_t{length} * heads * D;
    strides[1] = D;
    strides[2] = std::int64_t{heads} * D;
  };
  set(params.q_stride, c.queries, c.query_heads);
  set(params.k_stride, c.tokens, c.kv_heads);
  set(params.v_stride, c.tokens, c.kv_heads);
  params.batch = c.batch;
  params.query_heads = c.query_heads;
  params.kv_heads = c.kv_heads;
  params.tokens = params.capacity = c.tokens;
  params.queries = c.queries;
  params.head_dim = D;
  params.scale = 1.0F / std::sqrt(static_cast<float>(D));
  params.element = std::is_same_v<Element, __half> ? zipvl::cuda::Element::kFloat16 : zipvl::cuda::Element::kBFloat16;
  params.ranges = {range.data(), group.data(), nullptr, nullptr, ranges.num_sinks, lse.data(), true, false};
  sparse_attn::sm90::launch_ranged_kernel<Element, D>(params, kNumSms, nullptr);

  const auto wide_q = emulated::widened(q), wide_k = emulated::widened(k), wide_v = emulated::widened(v),
             wide_out = emulated::widened(out);
  Errors errors;
  std::vector<const double*> seen_keys, seen_values;
  for (int b = 0; b < c.batch; ++b) {
    for (int n = 0; n < c.queries; ++n) {
      const int position = c.tokens - c.queries + n;
      for (int h = 0; h < c.query_heads; ++h) {
        const std::size_t query = (static_cast<std::size_t>(b) * c.queries + n) * c.query_heads + h;
        seen_keys.clear();
        seen_values.clear();
        for (int token = 0; token <= position; ++token) {
          if (token > position - c.window || token < c.sinks) {
            const std::size_t row =
                (static_cast<std::size_t>(b) * c.tokens + token) * c.kv_heads + h / (c.query_heads / c.kv_heads);
            seen_keys.push_back(&wide_k[row * D]);
            seen_values.push_back(&wide_v[row * D]);
          }
        }
        const auto should = emulated::attend(&wide_q[query * D], D, seen_keys, seen_values);
        errors.out = std::max(errors.out, emulated::difference(&wide_out[query * D], should.out));
        const float own = lse[(static_cast<std::size_t>(b) * c.query_heads + h) * c.queries + n];
        errors.lse = std::max(errors.lse, emulated::difference(own, should.lse * std::numbers::log2e));
      }
    }
  }
  return errors;
}

template <typename Element, int D>
void check(emulated::Report& report, const char* name, double most) {
  const WindowCase c = random_window();
  const Errors errors = errors_of<Element, D>(c);
  report(errors.out <= most && errors.lse <= 1e-4,
         "%s batch %d heads %2d/%d tokens %3d queries %3d window %3d sinks %2d: error %.5f, of the log-sum-exp %.6f",
         name, c.batch, c.query_heads, c.kv_heads, c.tokens, c.queries, c.window, c.sinks, errors.out, errors.lse);
}

}  // namespace

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    check<__nv_bfloat16, 128>(report, "bf16 128", 0.03);
    check<__half, 64>(report, "fp16  64", 0.004);
    check<__half, 96>(report, "fp16  96", 0.004);
    check<__half, 256>(report, "fp16 256", 0.004);
  });
}
