#include "cuda/select_tokens/plan.h"

#include <algorithm>
#include <utility>

#include "common/math.h"
#include "common/text.h"

namespace zipvl::plan {
namespace {

// A block's tokens, of which each of its threads holds 8, 16 or 32 in registers.
constexpr std::int64_t kShares[] = {4096, 8192, 16384};
constexpr std::int64_t kLargestShare = 16384;
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 20;  // whose keys' low bits the 40 bits of a reduced bucket hold
// Beside the copies of the budget's histogram.
constexpr std::int64_t kBlockBytes = 16 * 1024;
// Measured on an H200, tau 0.975, us (one block / cluster of 4 / of 8 / grid of 8 / of 32):
//   4,096 tokens 6.9 / 10.8 / 10.9 / 15.3 / -;   8,192: 9.9 / 10.9 / 10.9 / 16.3 / -;
//   16,384: 15.8 / 10.7 / 10.8 / 15.9 / -;       32,768: - / 14.2 / 11.5 / 16.6 / 18.0;
//   65,536: - / 21.2 / 14.8 / 19.9 / 18.8;       131,072: - / - / 22.6 / 28.5 / 20.3
constexpr std::int64_t kMaxBlockTokens = 8192;
constexpr std::int64_t kSmallCluster = 4, kMaxSmallClusterTokens = 16384;
constexpr std::int64_t kMaxClusterTokens = 65536;
// 131,072 tokens: 64 blocks 23.9 us, 132 39.7. Every barrier costs more with every block.
constexpr std::int64_t kGridBlocks = 32;
// Where there are no clusters.
constexpr std::int64_t kMaxLoneTokens = 16384;

// The tokens that each of `blocks` blocks takes; 0 where it is too much.
std::int64_t share(std::int64_t tokens, std::int64_t blocks) {
  for (const std::int64_t size : kShares) {
    if (size * blocks >= tokens) {
      return size;
    }
  }
  return 0;
}

std::int64_t block_bytes(std::int64_t tokens_per_block) {
  return kBlockBytes + tokens_per_block / kSelectTokensPerCopy * kSelectMassHistogramBytes;
}

SelectTokensPlan not_native(std::string reason) {
  SelectTokensPlan plan{};
  plan.team = SelectTeam::kNone;
  plan.reason = std::move(reason);
  return plan;
}

}  // namespace

SelectTokensPlan plan_select_tokens(const SelectTokensProblem& problem) {
  SelectTokensPlan plan{};
  plan.row_groups = problem.batch;
  std::int64_t largest = 0;  // share that fits
  for (const std::int64_t size : kShares) {
    largest = block_bytes(size) <= problem.shared_bytes ? size : largest;
  }
  if (largest == 0) {
    return not_native(join("a block takes ", block_bytes(kShares[0]), " bytes of shared memory, and the device has ",
                           problem.shared_bytes));
  }
  if (problem.tokens > kMaxTokens) {
    return not_native(join("the kernels take at most ", kMaxTokens, " tokens, got ", problem.tokens));
  }
  const bool clusters = problem.clusters && problem.tokens <= kMaxClusterTokens;
  if (problem.tokens <= (clusters ? kMaxBlockTokens : std::min(kMaxLoneTokens, largest))) {
    plan.team = SelectTeam::kBlock;
    plan.blocks_per_row = 1;
  } else if (clusters) {
    plan.team = SelectTeam::kCluster;
    plan.blocks_per_row = problem.tokens <= kMaxSmallClusterTokens ? kSmallCluster : kSelectMaxClusterBlocks;
  } else {
    plan.team = SelectTeam::kGrid;
    const std::int64_t wanted = std::min({ceil_div(problem.tokens, kShares[0]), kGridBlocks, problem.num_sms});
    plan.blocks_per_row = std::max({std::int64_t{2}, wanted, ceil_div(problem.tokens, largest)});
    if (plan.blocks_per_row > problem.num_sms) {
      return not_native(join("a row of ", problem.tokens, " tokens takes ", plan.blocks_per_row,
                             " blocks at once, and the device has ", problem.num_sms, " multiprocessors"));
    }
    plan.row_groups = std::max<std::int64_t>(1, std::min(problem.batch, problem.num_sms / plan.blocks_per_row));
    plan.row_workspace_bytes = kSelectBarrierBytes + kSelectHistograms * kSelectHistogramBytes +
                               2 * kSelectCandidatesBytes + kSelectGathers * plan.blocks_per_row * kSelectRecordBytes;
    plan.workspace_bytes = problem.batch * plan.row_workspace_bytes;
  }
  plan.tokens_per_block = share(problem.tokens, plan.blocks_per_row);
  return plan;
}

std::string SelectTokensPlan::describe() const {
  if (team == SelectTeam::kNone) {
    return join("select_tokens on CUDA: over ATen, because ", reason);
  }
  constexpr const char* kNames[] = {"one block", "a cluster", "a grid"};
  return join("select_tokens on CUDA by ", kNames[static_cast<int>(team)], ": ", blocks_per_row, " blocks of ",
              tokens_per_block, " tokens a row, ", row_groups, " rows at once, ", workspace_bytes,
              " bytes of workspace");
}

}  // namespace zipvl::plan
