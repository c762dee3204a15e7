// Hopper's two passes of probe_scores (wgmma, TMA) on a CPU, with the kernels before and between them, against float64.
//
//   probe_scores_sm90 CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "cuda/probe_scores/passes.h"
#include "cuda/probe_scores/sm90/launch_passes.cuh"
#include "hopper_host.h"
#include "scored_layer.h"

namespace zipvl::cuda::probe::sm90 {
alignas(1024) thread_local unsigned char shared_bytes[emulated::kSharedBytes];
const emulated::DynamicShared registered(shared_bytes);
}  // namespace zipvl::cuda::probe::sm90

namespace {

using namespace zipvl::cuda;

struct Passes : probe::sm90::Passes {
  template <int HeadDim>
  static constexpr bool kClusters = false;
};

// On few multiprocessors, so that blocks have several items, or on many.
template <typename Token, int D>
void check(emulated::Report& report, const char* name) {
  emulated::ScoredLayer<Token, D> layer(
      emulated::random_case(1, 1100));  // past 512 tokens a row of probes has several parts
  const emulated::Case& c = layer.c;
  const int multiprocessors = emulated::uniform(0, 1) == 0 ? emulated::uniform(1, 4) : 132;
  const bool probes = layer.probe_index();
  const double error = layer.probe_scores(
      [&](ProbeScoresParams params) {
        params.multiprocessors = multiprocessors;
        launch_passes_of<Passes, Token, D>(params, nullptr);
      },
      /*clusters=*/false);
  report(probes && error < 1e-4, "%s batch %d heads %2d/%d tokens %3d probes %2d + %2d%s%s on %3d: error %.1e", name,
         c.batch, c.query_heads, c.kv_heads, c.tokens, c.recent, c.random, c.causal ? " causal" : "",
         c.masked ? " masked" : "", multiprocessors, error);
}

}  // namespace

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    check<__nv_bfloat16, 128>(report, "bf16 128");
    check<__half, 64>(report, "fp16  64");
    check<__half, 96>(report, "fp16  96");
    check<__nv_bfloat16, 256>(report, "bf16 256");
  });
}
