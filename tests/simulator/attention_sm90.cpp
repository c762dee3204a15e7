// Hopper's kernel of sparse_attn (wgmma, TMA) on a CPU, behind pack_kv and seen_tokens as the op launches them, against
// float64.
//
//   attention_sm90 CASES SEED    prints a line a case, and ends with status 1 where one is wrong
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

// Packed rows past what pack_kv has to write are NaN.
template <typename Element, int D>
void attend(SparseAttnParams params) {
  params.capacity = zipvl::round_up(params.tokens, zipvl::plan::kSparseAttnPackedRows);
  const std::size_t packed = params.batch * params.kv_heads * params.capacity * D;
  std::vector<Element> k_packed(packed, Element(NAN)), v_packed(packed, Element(NAN));
  std::vector<std::int32_t> seen(params.batch * params.tokens, -7);
  params.k_packed = k_packed.data();
  params.v_packed = v_packed.data();
  const bool counts = params.all_queries && params.causal;
  if (counts) {
    launch_seen_tokens({seen.data(),
                        params.index,
                        {params.index_stride[0], params.index_stride[1]},
                        params.count,
                        params.count_stride,
                        params.batch,
                        params.tokens},
                       nullptr);
  }
  launch_pack_kv(sparse_attn::sm90::packing(params, kNumSms), nullptr);
  sparse_attn::sm90::launch_kernel<Element, D>(params, counts ? seen.data() : nullptr, kNumSms, nullptr);
}

template <typename Element, int D>
void check(emulated::Report& report, const char* name, double most) {
  const emulated::Case c = emulated::random_case();
  emulated::report_attention(report, name, c, emulated::error_of<Element, D>(c, attend<Element, D>), most);
}

}  // namespace

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    check<__nv_bfloat16, 128>(report, "bf16 128", 0.03);
    check<__half, 128>(report, "fp16 128", 0.004);
    check<__half, 64>(report, "fp16  64", 0.004);
    check<__half, 96>(report, "fp16  96", 0.004);
    check<__nv_bfloat16, 256>(report, "bf16 256", 0.03);
  });
}
