#include "plan/sparse_attn_cuda.h"

#include <sstream>

namespace zipvl::plan {
namespace {

constexpr std::int64_t kMostBatches = 64;  // batch rows in the scheduler's table in shared memory
constexpr std::int64_t kMostTokens = std::int64_t{1} << 20;
constexpr std::int64_t kMostHeadBlocks = 2147483647;  // tiles are numbered with an int
constexpr std::int64_t kQueryBlock = 128, kPackedRows = 128;

std::string why_not_native(const SparseAttnCudaProblem& problem) {
  std::ostringstream reason;
  if (!problem.half_precision) {
    reason << "the kernels take float16 and bfloat16";
  } else if (problem.head_dim != 64 && problem.head_dim != 96 && problem.head_dim != 128 && problem.head_dim != 256) {
    reason << "the kernels take head_dim 64, 96, 128 and 256, got " << problem.head_dim;
  } else if (!problem.aligned) {
    reason << "the kernels take rows of q, k and v that begin at multiples of 16 bytes";
  } else if (!(problem.scale > 0)) {
    reason << "the kernels take a scale above 0, got " << problem.scale;
  } else if (problem.batch > kMostBatches) {
    reason << "the kernels take at most " << kMostBatches << " batch rows, got " << problem.batch;
  } else if (problem.tokens > kMostTokens) {
    reason << "the kernels take at most " << kMostTokens << " tokens, got " << problem.tokens;
  } else if (problem.batch * problem.query_heads * ((problem.tokens + kQueryBlock - 1) / kQueryBlock) >
             kMostHeadBlocks) {
    reason << "more than " << kMostHeadBlocks << " tiles";
  }
  return reason.str();
}

}  // namespace

SparseAttnCudaPlan plan_sparse_attn_cuda(const SparseAttnCudaProblem& problem) {
  SparseAttnCudaPlan plan{};
  plan.reason = why_not_native(problem);
  if (!plan.reason.empty()) {
    plan.kernel = SparseAttnKernel::kAten;
    return plan;
  }
  plan.kernel = problem.hopper ? SparseAttnKernel::kSm90 : SparseAttnKernel::kSm80;
  if (plan.kernel == SparseAttnKernel::kSm90) {
    // Packing moves 2 * count rows once, so that K and V come by the copy engine: a gather by cp.async costs 6 to 24%
    // of the whole in published comparisons. Only the device knows count, so there is room for every token.
    plan.capacity = (problem.tokens + kPackedRows - 1) / kPackedRows * kPackedRows;
    plan.seen_tokens = problem.causal && problem.all_queries;
    constexpr std::int64_t kElementBytes = 2, kCountBytes = 4;
    plan.workspace_bytes = 2 * problem.batch * problem.kv_heads * plan.capacity * problem.head_dim * kElementBytes +
                           (plan.seen_tokens ? problem.batch * problem.tokens * kCountBytes : 0);
  }
  return plan;
}

std::string SparseAttnCudaPlan::describe() const {
  std::ostringstream text;
  text << "sparse_attn on CUDA: ";
  if (kernel == SparseAttnKernel::kAten) {
    text << "over ATen, because " << reason;
  } else if (kernel == SparseAttnKernel::kSm80) {
    text << "sm_80 kernel, K and V gathered in the kernel";
  } else {
    text << "sm_90 kernel, K and V packed into " << capacity << " rows a head, " << workspace_bytes
         << " bytes of workspace";
  }
  return text.str();
}

}  // namespace zipvl::plan
