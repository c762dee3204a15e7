#include "cuda/sparse_attn/plan.h"

#include "common/math.h"
#include "common/text.h"
#include "cuda/common/element.h"

namespace zipvl::plan {
namespace {

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 20;
constexpr std::int64_t kMaxTiles = 2147483647;  // they are numbered with an int
constexpr std::int64_t kQueryBlock = 128;

std::string why_not_native(const SparseAttnCudaProblem& problem) {
  if (std::string reason = cuda::why_not_element(problem.half_precision, problem.head_dim); !reason.empty()) {
    return reason;
  }
  if (!problem.aligned) {
    return "the kernels take rows of q, k and v that begin at multiples of 16 bytes";
  }
  if (!(static_cast<float>(problem.scale) > 0.0F)) {
    return join("the kernels take a scale above 0, got ", problem.scale);
  }
  if (problem.batch > kSparseAttnMaxBatches) {
    return join("the kernels take at most ", kSparseAttnMaxBatches, " batch rows, got ", problem.batch);
  }
  if (problem.tokens > kMaxTokens) {
    return join("the kernels take at most ", kMaxTokens, " tokens, got ", problem.tokens);
  }
  if (problem.batch * problem.query_heads * ceil_div(problem.tokens, kQueryBlock) > kMaxTiles) {
    return join("the kernels take at most ", kMaxTiles, " tiles of ", kQueryBlock, " queries");
  }
  return "";
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
    plan.capacity = round_up(problem.tokens, kSparseAttnPackedRows);
    plan.seen_tokens = problem.causal && problem.all_queries;
    constexpr std::int64_t kElementBytes = 2, kCountBytes = 4;
    plan.workspace_bytes = 2 * problem.batch * problem.kv_heads * plan.capacity * problem.head_dim * kElementBytes +
                           (plan.seen_tokens ? problem.batch * problem.tokens * kCountBytes : 0);
  }
  return plan;
}

RangedAttnWorkspace plan_ranged_attn(const RangedAttnProblem& problem) {
  constexpr std::int64_t kAlignment = 256, kIntBytes = 4, kElementBytes = 2, kGroup = 32;
  RangedAttnWorkspace space{};
  const auto take = [&space](bool needed, std::int64_t bytes) {
    const std::int64_t begin = space.bytes;
    space.bytes += needed ? round_up(bytes, kAlignment) : 0;
    return begin;
  };
  const std::int64_t rows = problem.batch * problem.queries;
  const std::int64_t groups = problem.batch * ceil_div(problem.queries, kGroup);
  const std::int64_t packed = problem.batch * problem.kv_heads * problem.tokens * problem.head_dim * kElementBytes;
  const bool packs = problem.lists_real && problem.kernel == SparseAttnKernel::kSm90;
  space.real_index = take(problem.lists_real, problem.batch * problem.tokens * kIntBytes);
  space.real_count = take(problem.lists_real, problem.batch * kIntBytes);
  space.real_k = take(packs, packed);
  space.real_v = take(packs, packed);
  space.window_range = take(problem.window, rows * 2 * kIntBytes);
  space.window_group = take(problem.window, groups * 4 * kIntBytes);
  space.range = take(true, rows * 2 * kIntBytes);
  space.group = take(true, groups * 4 * kIntBytes);
  space.query = take(!problem.all_queries, rows * kIntBytes);
  space.num_rows = take(!problem.all_queries, problem.batch * kIntBytes);
  space.lse = take(problem.window, rows * problem.query_heads * kIntBytes);
  return space;
}

std::string SparseAttnCudaPlan::describe() const {
  switch (kernel) {
    case SparseAttnKernel::kAten:
      return join("sparse_attn on CUDA: over ATen, because ", reason);
    case SparseAttnKernel::kSm80:
      return "sparse_attn on CUDA: sm_80 kernel, K and V gathered in the kernel";
    case SparseAttnKernel::kSm90:
      break;
  }
  return join("sparse_attn on CUDA: sm_90 kernel, K and V packed into ", capacity, " rows a head, ", workspace_bytes,
              " bytes of workspace");
}

}  // namespace zipvl::plan
