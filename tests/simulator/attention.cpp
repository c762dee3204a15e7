// The portable kernel of sparse_attn (mma.sync) on a CPU, against float64: selected queries over selected keys, zeros
// elsewhere, and all queries over selected keys.
//
//   attention CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "attention_reference.h"
#include "cuda/sparse_attn/sm80/launch.cuh"
#include "cuda_on_cpu.h"

namespace zipvl::cuda::sparse_attn::sm80 {
alignas(1024) thread_local unsigned char memory[emulated::kSharedBytes];
const emulated::DynamicShared registered(memory);
}  // namespace zipvl::cuda::sparse_attn::sm80

// What the launch asks of the device: Hopper's shared memory, and few multiprocessors, so that zeros share them.
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 233472;
  return cudaSuccess;
}

namespace zipvl::cuda {
bool runs_hopper_code(int /*device*/) { return false; }
}  // namespace zipvl::cuda

namespace {

template <typename Element, int D>
void check(emulated::Report& report, const char* name, double most) {
  const emulated::Case c = emulated::random_case();
  const double error = emulated::error_of<Element, D>(c, [](const zipvl::cuda::SparseAttnParams& params) {
    zipvl::cuda::sparse_attn::sm80::launch_kernel<Element, D>(params, nullptr);
  });
  emulated::report_attention(report, name, c, error, most);
}

}  // namespace

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    check<__nv_bfloat16, 128>(report, "bf16 128", 0.03);
    check<__half, 64>(report, "fp16  64", 0.004);
    check<__half, 96>(report, "fp16  96", 0.004);
  });
}
