#include "cuda/decode_attn/plan.h"

#include <algorithm>

#include "common/math.h"
#include "common/text.h"
#include "cuda/common/element.h"
#include "cuda/decode_attn/shape.h"

namespace zipvl::plan {
namespace {

constexpr std::int64_t kMaxTiles = 2147483647;  // they are numbered with 32 bits, and so are blocks of a grid

std::int64_t items(const DecodeAttnCudaProblem& problem, const DecodeAttnCudaPlan& plan) {
  return problem.batch * problem.kv_heads * plan.head_chunks;
}

bool holds(const DecodeAttnCudaProblem& problem, std::int64_t bytes_of_warps) {
  return bytes_of_warps + cuda::decode_attn::kBlockBytes <= problem.shared_bytes;
}

std::string why_not_native(const DecodeAttnCudaProblem& problem, const DecodeAttnCudaPlan& plan, std::int64_t tiles) {
  if (const std::string reason = cuda::why_not_element(problem.half_precision, problem.head_dim); !reason.empty()) {
    return reason;
  }
  if (!problem.aligned) {
    return "the kernels take rows of q and of the cache that begin at multiples of 16 bytes";
  }
  if (items(problem, plan) * tiles > kMaxTiles || problem.batch * problem.query_heads > kMaxTiles) {
    return join("the kernels take at most ", kMaxTiles, " tiles of tokens");
  }
  if (!holds(problem, plan.shared_bytes)) {
    return join("the kernel needs ", plan.shared_bytes, " bytes of shared memory, the GPU has ", problem.shared_bytes);
  }
  return "";
}

// Blocks for as many items as there are, each with `tiles` tiles; `min_tiles`: that a block is worth starting for.
void set_blocks(const DecodeAttnCudaProblem& problem, DecodeAttnCudaPlan& plan, std::int64_t tiles,
                std::int64_t min_tiles) {
  plan.blocks = static_cast<int>(
      std::clamp<std::int64_t>(items(problem, plan) * ceil_div<std::int64_t>(tiles, min_tiles), 1, problem.num_sms));
  // Each step from block to block or from item to item starts one split.
  plan.partials = plan.blocks + items(problem, plan);
  constexpr std::int64_t kFloatBytes = 4;
  plan.workspace_bytes = plan.partials * cuda::decode_attn::kHeads * (problem.head_dim + 1) * kFloatBytes;
}

DecodeAttnCudaPlan common_plan(const DecodeAttnCudaProblem& problem) {
  DecodeAttnCudaPlan plan{};
  plan.head_chunks =
      static_cast<int>(ceil_div<std::int64_t>(problem.query_heads / problem.kv_heads, cuda::decode_attn::kHeads));
  return plan;
}

}  // namespace

DecodeAttnCudaPlan plan_decode_attn_cuda(const DecodeAttnCudaProblem& problem) {
  DecodeAttnCudaPlan plan = common_plan(problem);
  plan.warps = cuda::decode_attn::max_warps(problem.head_dim);
  if (!holds(problem, plan.warps * cuda::decode_attn::warp_bytes(problem.head_dim))) {
    plan.warps /= 2;  // 8.6 and 8.9 have 99 KB
  }
  plan.shared_bytes = plan.warps * cuda::decode_attn::warp_bytes(problem.head_dim);
  const std::int64_t tiles = ceil_div<std::int64_t>(problem.slots, cuda::decode_attn::kTileTokens);
  plan.reason = why_not_native(problem, plan, tiles);
  set_blocks(problem, plan, tiles, plan.warps);
  return plan;
}

DecodeAttnCudaPlan plan_decode_attn_quantized_cuda(const DecodeAttnCudaProblem& problem,
                                                   const QuantizedSegments& segments) {
  DecodeAttnCudaPlan plan = common_plan(problem);
  const std::int64_t warp_bytes =
      cuda::decode_attn::quantized_warp_bytes(problem.head_dim, segments.high_bits, segments.low_bits);
  plan.warps = cuda::decode_attn::quantized_warps(problem.head_dim);
  if (!holds(problem, plan.warps * warp_bytes)) {
    plan.warps = cuda::decode_attn::kMinQuantizedWarps;
  }
  plan.shared_bytes = plan.warps * warp_bytes;
  const std::int64_t tiles = ceil_div<std::int64_t>(problem.slots, cuda::decode_attn::kTileTokens) +
                             segments.high_blocks + segments.low_blocks;
  plan.reason = why_not_native(problem, plan, tiles);
  set_blocks(problem, plan, tiles, cuda::decode_attn::kMinQuantizedWarps);
  return plan;
}

std::string DecodeAttnCudaPlan::describe() const {
  if (!reason.empty()) {
    return join("decode on CUDA: no kernel, because ", reason);
  }
  return join("decode on CUDA: ", blocks, " blocks of ", warps, " warps, ", shared_bytes, " bytes of shared memory, ",
              partials, " partial results in ", workspace_bytes, " bytes");
}

}  // namespace zipvl::plan
