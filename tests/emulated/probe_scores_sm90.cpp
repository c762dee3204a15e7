// Hopper's two passes of probe_scores (wgmma, TMA) on a CPU, with the kernels before and between them, and both in one
// kernel of clusters, against float64.
//
//   probe_scores_sm90 CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "cuda/probe_scores/passes.h"
#include "cuda/probe_scores/sm90/launch.cuh"
#include "hopper_host.h"
#include "scored_layer.h"

namespace zipvl::cuda::probe_scores::sm90 {
alignas(1024) thread_local unsigned char shared_bytes[emulated::kSharedBytes];
const emulated::DynamicShared registered(shared_bytes);
}  // namespace zipvl::cuda::probe_scores::sm90

namespace {

using namespace zipvl::cuda;

// On few multiprocessors, so that blocks have several items, or on many. clusters: both passes in one kernel where the
// plan wants it; that kernel may draw the probes itself.
template <typename Token, int D>
void check(emulated::Report& report, const char* name, bool clusters) {
  // Past 512 tokens a row of probes has several parts, past 1,024 a block of a cluster several tiles of keys.
  emulated::ScoredLayer<Token, D> layer(clusters ? emulated::random_case(129, 1400) : emulated::random_case(1, 1100));
  const emulated::Case& c = layer.c;
  const int num_sms = emulated::uniform(0, 1) == 0 ? emulated::uniform(1, 4) : 132;
  const bool probes = layer.probe_index(), draws = !c.masked && emulated::uniform(0, 1) == 0;
  int blocks = 0;
  const double error = layer.probe_scores(
      [&](ProbeScoresParams params) {
        params.num_sms = num_sms;
        blocks = params.cluster_blocks;
        if (blocks > 0 && draws) {
          params.probe_index = nullptr;
          params.draw = zipvl::draw_probes(c.tokens, c.recent, c.random, c.seed);
        }
        probe_scores::launch_passes<probe_scores::sm90::Passes<Token, D>>(params, nullptr);
      },
      clusters);
  report(probes && error < 1e-4,
         "%s batch %d heads %2d/%d tokens %3d probes %2d + %2d%s%s on %3d, clusters of %d%s: error %.1e", name, c.batch,
         c.query_heads, c.kv_heads, c.tokens, c.recent, c.random, c.causal ? " causal" : "", c.masked ? " masked" : "",
         num_sms, blocks, blocks > 0 && draws ? ", drawn there" : "", error);
}

}  // namespace

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    check<__nv_bfloat16, 256>(report, "bf16 256", false);
    for (const bool clusters : {false, true}) {
      check<__nv_bfloat16, 128>(report, "bf16 128", clusters);
      check<__half, 64>(report, "fp16  64", clusters);
      check<__half, 96>(report, "fp16  96", clusters);
    }
  });
}
