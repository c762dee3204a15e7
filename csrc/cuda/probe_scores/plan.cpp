#include "cuda/probe_scores/plan.h"

#include <algorithm>
#include <bit>

#include "common/math.h"
#include "common/text.h"
#include "cuda/common/element.h"

namespace zipvl::plan {
namespace {

// The splits of one batch row fill a chip of this many multiprocessors (H100, H200: 132).
constexpr std::int64_t kNumSms = 132;
// Items a multiprocessor gets in the first pass at least: the causal limit makes some of them short. Measured on an
// H200 at 28/4 heads: 16 tiles a chunk beat 8 by 4% at 32K tokens, and 4 beat 2 by 1% at 4K.
constexpr std::int64_t kFirstItemsEach = 2;
// Longer chunks would save nothing more: a block loads 256 rows once for 16 tiles of keys.
constexpr std::int64_t kMaxChunkTiles = 16;
// Shorter ones would load more rows than keys.
constexpr std::int64_t kMinChunkTiles = 4;
// Clusters of one batch row. An H200 holds 15 at once, as cudaOccupancyMaxActiveClusters says: a cluster lies within
// one of its groups of multiprocessors, some of which are of less than 16. A second wave costs more than it saves.
constexpr std::int64_t kMaxClusters = 15;
constexpr std::int64_t kAlignment = 256;

constexpr std::int64_t kMaxBatches = 64;
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 20;

std::string why_not_native(const ProbeScoresCudaProblem& problem) {
  if (std::string reason = cuda::why_not_element(problem.half_precision, problem.head_dim); !reason.empty()) {
    return reason;
  }
  if (!problem.aligned) {
    return "the kernels take rows of k that begin at multiples of 16 bytes";
  }
  if (problem.probes > kProbeMaxProbes) {
    return join("the kernels take at most ", kProbeMaxProbes, " probes, got ", problem.probes);
  }
  if (problem.batch > kMaxBatches) {
    return join("the kernels take at most ", kMaxBatches, " batch rows, got ", problem.batch);
  }
  if (problem.tokens > kMaxTokens) {
    return join("the kernels take at most ", kMaxTokens, " tokens, got ", problem.tokens);
  }
  return "";
}

// Both passes in one kernel, if the keys fit into a cluster and the clusters of a batch row onto the chip. A block
// alone is no cluster, and may not store into one.
void plan_clusters(const ProbeScoresCudaProblem& problem, ProbeScoresCudaPlan& plan) {
  const std::int64_t units = ceil_div(plan.rows, kProbeUnitRows);
  const std::int64_t clusters = std::min(units, kMaxClusters / problem.kv_heads);  // of a head
  if (!problem.clusters || problem.tokens <= kProbeTileKeys ||
      problem.tokens > kProbeClusterBlocks * probe_cluster_keys(problem.head_dim) ||
      clusters * kProbeClusterUnits < units) {
    return;
  }
  plan.cluster_blocks = std::min(kProbeClusterBlocks, ceil_div(problem.tokens, kProbeTileKeys));
  plan.row_splits = ceil_div(units, ceil_div(units, clusters));
}

// Two kernels of persistent blocks.
void plan_passes(const ProbeScoresCudaProblem& problem, ProbeScoresCudaPlan& plan) {
  const std::int64_t heads = problem.batch * problem.kv_heads;
  const std::int64_t key_tiles = ceil_div(problem.tokens, kProbeTileKeys);
  const std::int64_t row_blocks = ceil_div(plan.rows, kProbeBlockRows);
  const std::int64_t row_keys = problem.kv_heads * row_blocks * key_tiles;
  // A power of two divides the usual lengths, and leaves no short chunk over.
  const auto fair = static_cast<std::uint64_t>(row_keys / (kNumSms * kFirstItemsEach));
  const std::int64_t chunk_tiles =
      std::clamp(static_cast<std::int64_t>(std::bit_ceil(fair)), kMinChunkTiles, kMaxChunkTiles);
  plan.chunk_keys = chunk_tiles * kProbeTileKeys;
  plan.splits = ceil_div(key_tiles, chunk_tiles);
  plan.first_items = heads * row_blocks * plan.splits;

  const std::int64_t key_blocks = ceil_div(problem.tokens, kProbeBlockRows);
  plan.row_splits =
      std::clamp<std::int64_t>(kNumSms / (problem.kv_heads * key_blocks), 1, plan.rows_padded / kProbeRowAlignment);
  plan.second_items = heads * key_blocks * plan.row_splits;
}

}  // namespace

ProbeScoresCudaPlan plan_probe_scores_cuda(const ProbeScoresCudaProblem& problem) {
  ProbeScoresCudaPlan plan{};
  plan.reason = why_not_native(problem);
  if (!plan.reason.empty()) {
    return plan;
  }
  const std::int64_t heads = problem.batch * problem.kv_heads;
  plan.rows = problem.query_heads / problem.kv_heads * problem.probes;
  plan.rows_padded = round_up(plan.rows, kProbeRowAlignment);
  plan.words = round_up(problem.tokens, kProbeTileKeys) / 32;
  plan_clusters(problem, plan);
  const bool passes = plan.cluster_blocks == 0;
  if (passes) {
    plan_passes(problem, plan);
  }

  std::int64_t end = 0;
  const auto take = [&end](std::int64_t bytes) {
    const std::int64_t begin = end;
    end += round_up(bytes, kAlignment);
    return begin;
  };
  ProbeScoresWorkspace& space = plan.workspace;
  space.probe_rows = take(passes ? heads * plan.rows * problem.head_dim * 2 : 0);
  space.row_limit = take(passes ? problem.batch * plan.rows_padded * 4 : 0);
  space.unit_range = take(passes ? problem.batch * (plan.rows_padded / kProbeUnitRows) * 8 : 0);
  space.mask_words = take(passes && problem.masked ? problem.batch * plan.words * 4 : 0);
  space.partial = take(heads * plan.splits * plan.rows_padded * 8);
  space.row_lse = take(passes ? heads * plan.rows_padded * 4 : 0);
  space.sums = take(heads * plan.row_splits * problem.tokens * 4);
  space.bytes = end;

  plan.exponentials =
      2.0 * static_cast<double>(heads) * static_cast<double>(plan.rows) * static_cast<double>(problem.tokens);
  plan.flops = 2.0 * plan.exponentials * static_cast<double>(problem.head_dim);
  return plan;
}

std::string ProbeScoresCudaPlan::describe() const {
  if (!reason.empty()) {
    return join("probe_scores on CUDA: over ATen, because ", reason);
  }
  if (cluster_blocks > 0) {
    return join("probe_scores on CUDA: ", rows, " rows a key/value head; one kernel, ", row_splits, " clusters of ",
                cluster_blocks, " blocks a head; ", workspace.bytes, " bytes of workspace, ", flops, " FLOPs, ",
                exponentials, " exponentials");
  }
  return join("probe_scores on CUDA: ", rows, " rows a key/value head; first pass ", first_items, " items of ",
              chunk_keys, " keys, second ", second_items, " items of ", row_splits, " row splits; ", workspace.bytes,
              " bytes of workspace, ", flops, " FLOPs, ", exponentials, " exponentials");
}

}  // namespace zipvl::plan
