#include "plan/select_tokens.h"

#include <algorithm>

#include "common/text.h"

namespace zipvl::plan {
namespace {

// A block holds both scores of its tokens in shared memory, 8 bytes a token, beside its histogram and records.
constexpr std::int64_t kTokenBytes = 8;
constexpr std::int64_t kBlockBytes = 18 * 1024;
// Measured on an H200, tau 0.975, us (one block / cluster of 4 / of 8 / grid of 32):
//   4,096 tokens 18.1 / 20.9 / 24.6 / 36.5;   8,192: 25.8 / 21.3 / 24.7 / 36.9;   16,384: 41.0 / 25.7 / 25.6 / 37.9;
//   32,768: - / 34.6 / 30.1 / 37.3;   65,536: - / 51.5 / 38.7 / 37.5;   131,072: - / - / 55.4 / 41.8
constexpr std::int64_t kMostBlockTokens = 4096;
constexpr std::int64_t kSmallCluster = 4, kMostSmallClusterTokens = 16384;
constexpr std::int64_t kLargeCluster = 8, kMostClusterTokens = 49152;
// 1,048,576 tokens: 64 blocks 86.5 us, 132 blocks 136.7. Every meeting costs more with every block.
constexpr std::int64_t kGridBlocks = 32, kGridBlockTokens = 16384;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t share(std::int64_t tokens, std::int64_t blocks) {
  return ceil_div(ceil_div(tokens, blocks), kSelectGranule) * kSelectGranule;
}

}  // namespace

SelectTokensPlan plan_select_tokens(const SelectTokensProblem& problem) {
  SelectTokensPlan plan{};
  plan.row_groups = problem.batch;
  if (problem.tokens <= kMostBlockTokens) {
    plan.team = SelectTeam::kBlock;
    plan.blocks_per_row = 1;
  } else if (problem.clusters && problem.tokens <= kMostClusterTokens) {
    plan.team = SelectTeam::kCluster;
    plan.blocks_per_row = problem.tokens <= kMostSmallClusterTokens ? kSmallCluster : kLargeCluster;
  } else {
    const std::int64_t fit = (problem.shared_bytes - kBlockBytes) / kTokenBytes / kSelectGranule * kSelectGranule;
    const std::int64_t most = std::min(kGridBlockTokens, std::max(fit, kSelectGranule));
    plan.team = SelectTeam::kGrid;
    const std::int64_t wanted = std::clamp<std::int64_t>(ceil_div(problem.tokens, kSelectGranule), 2, kGridBlocks);
    plan.blocks_per_row = std::min(std::max(wanted, ceil_div(problem.tokens, most)), problem.multiprocessors);
    if (plan.blocks_per_row < 2 || share(problem.tokens, plan.blocks_per_row) > fit) {
      return {SelectTeam::kNone, 0, 0, 0, 0, 0};
    }
    plan.row_groups = std::max<std::int64_t>(1, std::min(problem.batch, problem.multiprocessors / plan.blocks_per_row));
    plan.row_workspace_bytes = kSelectMeetingBytes + kSelectLevels * kSelectBins * 8 +
                               kSelectGathers * plan.blocks_per_row * kSelectRecordBytes;
    plan.workspace_bytes = problem.batch * plan.row_workspace_bytes;
  }
  plan.tokens_per_block = share(problem.tokens, plan.blocks_per_row);
  return plan;
}

std::string SelectTokensPlan::describe() const {
  constexpr const char* kNames[] = {"one block", "a cluster", "a grid", "ATen"};
  std::string text;
  text += join("select_tokens by ", kNames[static_cast<int>(team)]);
  if (team != SelectTeam::kNone) {
    text += join(": ", blocks_per_row, " blocks of ", tokens_per_block, " tokens a row, ", row_groups,
                 " rows at once, ", workspace_bytes, " bytes of workspace");
  }
  return text;
}

}  // namespace zipvl::plan
