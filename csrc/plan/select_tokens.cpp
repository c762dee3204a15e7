#include "plan/select_tokens.h"

#include <algorithm>
#include <sstream>

namespace zipvl::plan {
namespace {

// A block holds both scores of its tokens in shared memory, 8 bytes a token, beside 17 KB of its own (33 in a cluster).
constexpr std::int64_t kMostBlockTokens = 4 * kSelectThreads;
constexpr std::int64_t kClusterBlocks = 8;  // the most that every sm_90 device takes
constexpr std::int64_t kMostClusterTokens = kClusterBlocks * 16 * kSelectThreads;
// 80 + 18 KB fit the 99 KB a block may have on sm_86 and sm_89, the least of sm_80 and later.
constexpr std::int64_t kMostGridBlockTokens = 10 * kSelectThreads;
constexpr std::int64_t kGridBlockTokens = 8 * kSelectThreads;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t share(std::int64_t tokens, std::int64_t blocks) {
  return ceil_div(ceil_div(tokens, blocks), kSelectThreads) * kSelectThreads;
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
    plan.blocks_per_row = kClusterBlocks;
  } else {
    plan.team = SelectTeam::kGrid;
    plan.blocks_per_row =
        std::min(std::max<std::int64_t>(2, ceil_div(problem.tokens, kGridBlockTokens)), problem.multiprocessors);
    plan.row_groups = std::max<std::int64_t>(1, std::min(problem.batch, problem.multiprocessors / plan.blocks_per_row));
    plan.row_workspace_bytes = kSelectMeetingBytes + kSelectLevels * kSelectBins * 8 +
                               kSelectGathers * plan.blocks_per_row * kSelectRecordBytes;
    plan.workspace_bytes = problem.batch * plan.row_workspace_bytes;
  }
  plan.tokens_per_block = share(problem.tokens, plan.blocks_per_row);
  if (plan.team == SelectTeam::kGrid && (plan.tokens_per_block > kMostGridBlockTokens || plan.blocks_per_row < 2)) {
    return {SelectTeam::kNone, 0, 0, 0, 0, 0};
  }
  return plan;
}

std::string SelectTokensPlan::describe() const {
  constexpr const char* kNames[] = {"one block", "a cluster", "a grid", "ATen"};
  std::ostringstream text;
  text << "select_tokens by " << kNames[static_cast<int>(team)];
  if (team != SelectTeam::kNone) {
    text << ": " << blocks_per_row << " blocks of " << tokens_per_block << " tokens a row, " << row_groups
         << " rows at once, " << workspace_bytes << " bytes of workspace";
  }
  return text.str();
}

}  // namespace zipvl::plan
