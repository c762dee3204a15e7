#include "plan/decode_attn_cuda.h"

#include <algorithm>

#include "common/decode_shape.h"
#include "common/text.h"

namespace zipvl::plan {
namespace {

constexpr std::int64_t kMostTiles = 2147483647;  // they are numbered with 32 bits, and so are blocks of a grid

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t items(const DecodeAttnCudaProblem& problem, const DecodeAttnCudaPlan& plan) {
  return problem.batch * problem.kv_heads * plan.head_chunks;
}

std::string why_not_native(const DecodeAttnCudaProblem& problem, const DecodeAttnCudaPlan& plan, std::int64_t tiles) {
  if (!problem.half_precision) {
    return "the kernels take float16 and bfloat16";
  }
  if (problem.head_dim != 64 && problem.head_dim != 96 && problem.head_dim != 128 && problem.head_dim != 256) {
    return join("the kernels take head_dim 64, 96, 128 and 256, got ", problem.head_dim);
  }
  if (!problem.aligned) {
    return "the kernels take rows of q and of the cache that begin at multiples of 16 bytes";
  }
  if (items(problem, plan) * tiles > kMostTiles || problem.batch * problem.query_heads > kMostTiles) {
    return join("the kernels take at most ", kMostTiles, " tiles of tokens");
  }
  if (plan.shared_bytes > problem.shared_bytes) {
    return join("the kernel needs ", plan.shared_bytes, " bytes of shared memory, the GPU has ", problem.shared_bytes);
  }
  return "";
}

void size_workspace(const DecodeAttnCudaProblem& problem, DecodeAttnCudaPlan& plan) {
  // Each step from block to block or from item to item starts one partial result.
  plan.places = plan.blocks + items(problem, plan);
  constexpr std::int64_t kFloatBytes = 4;
  plan.workspace_bytes = plan.places * decode_shape::kHeads * (problem.head_dim + 1) * kFloatBytes;
}

DecodeAttnCudaPlan common_plan(const DecodeAttnCudaProblem& problem) {
  DecodeAttnCudaPlan plan{};
  plan.head_chunks = static_cast<int>(ceil_div(problem.query_heads / problem.kv_heads, decode_shape::kHeads));
  return plan;
}

}  // namespace

DecodeAttnCudaPlan plan_decode_attn_cuda(const DecodeAttnCudaProblem& problem) {
  DecodeAttnCudaPlan plan = common_plan(problem);
  plan.warps = decode_shape::most_warps(problem.head_dim);
  if (decode_shape::ring_bytes(problem.head_dim, plan.warps) > problem.shared_bytes) {
    plan.warps /= 2;  // 8.6 and 8.9 have 99 KB
  }
  plan.shared_bytes = decode_shape::ring_bytes(problem.head_dim, plan.warps);
  const std::int64_t tiles = ceil_div(problem.slots, decode_shape::kTileTokens);
  plan.reason = why_not_native(problem, plan, tiles);
  const std::int64_t most = std::min<std::int64_t>(problem.multiprocessors, decode_shape::kMostBlocks);
  plan.blocks = static_cast<int>(std::clamp<std::int64_t>(ceil_div(items(problem, plan) * tiles, plan.warps), 1, most));
  size_workspace(problem, plan);
  return plan;
}

DecodeAttnCudaPlan plan_decode_attn_quantized_cuda(const DecodeAttnCudaProblem& problem,
                                                   const QuantizedSegments& segments) {
  DecodeAttnCudaPlan plan = common_plan(problem);
  plan.warps = decode_shape::kQuantizedWarps;
  plan.shared_bytes =
      plan.warps * (decode_shape::quantized_query_bytes(problem.head_dim) +
                    decode_shape::quantized_ring_bytes(problem.head_dim, segments.high_bits, segments.low_bits));
  const std::int64_t tiles =
      ceil_div(problem.slots, decode_shape::kTileTokens) + segments.high_blocks + segments.low_blocks;
  plan.reason = why_not_native(problem, plan, tiles);
  const std::int64_t resident = std::clamp<std::int64_t>(problem.shared_bytes / plan.shared_bytes, 1,
                                                         decode_shape::quantized_blocks(problem.head_dim));
  const std::int64_t most = std::min<std::int64_t>(resident * problem.multiprocessors, decode_shape::kMostBlocks);
  plan.blocks = static_cast<int>(std::clamp<std::int64_t>(ceil_div(items(problem, plan) * tiles, plan.warps), 1, most));
  size_workspace(problem, plan);
  return plan;
}

std::string DecodeAttnCudaPlan::describe() const {
  if (!reason.empty()) {
    return join("decode on CUDA: no kernel, because ", reason);
  }
  return join("decode on CUDA: ", blocks, " blocks of ", warps, " warps, ", shared_bytes, " bytes of shared memory, ",
              places, " partial results in ", workspace_bytes, " bytes");
}

}  // namespace zipvl::plan
