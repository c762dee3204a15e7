// The ops where no kernel does them: over ATen for tensors of any device, or by loops over a CPU's memory.
// Arguments are checked, and B, N > 0. On the CPU counts are read, so that work is proportional to what was selected;
// on any other device nothing is copied to the host: every place is computed and masked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/quantized_block.h"
#include "ops/args.h"

namespace zipvl::cpu {

using ops::OptionalTensor;
using ops::TensorPair;
using torch::stable::Tensor;

// CPU tensors alone; among all of q's tokens.
Tensor probe_index(const ops::ProbeIndexArgs& args);

TensorPair probe_scores(const ops::ProbeScoresArgs& args);
TensorPair select_tokens(const ops::SelectTokensArgs& args);
TensorPair pack_kv(const ops::PackKvArgs& args);
Tensor pack_paged(const ops::PackPagedArgs& args);  // CPU tensors alone
Tensor sparse_attn(const ops::SparseAttnArgs& args);
Tensor window_attn(const ops::SparseAttnArgs& args);  // sparse_attn with local_window > 0
Tensor project_queries(const ops::ProjectQueriesArgs& args);
Tensor project_outputs(const ops::ProjectOutputsArgs& args);

// q [B, Hq, 1, D], caches [B, Hkv, S, D], lengths [B] int32 -> out [B, Hq, 1, D], lse [B, Hq, 1] float32
TensorPair decode_attn(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths,
                       double scale);

// ---- quantised caches, CPU tensors alone
// k, v [B, Hkv, N, D], index [B, N], count [B] int32, v_factor [B, Hkv, D] float32 or absent, token_mask [B, N] bool or
// absent -> high [B, Hkv, ceil(N / 64) + 1, bytes], blocks [B] int32, low, blocks, v_factor. Bytes of unused blocks are
// 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_kv(const Tensor& k, const Tensor& v, const Tensor& index,
                                                               const Tensor& count, quantized::Bits high_bits,
                                                               quantized::Bits low_bits, const OptionalTensor& v_factor,
                                                               const OptionalTensor& token_mask);

// One segment of a quantised cache: packed [B, Hkv, M, bytes] uint8 and the blocks [B] int32 of each row in use.
struct Segment {
  const Tensor& packed;
  const Tensor& blocks;
  quantized::Bits bits;
};

// Tokens of row b in a segment. Counts outside their range are clamped.
std::int64_t segment_tokens(const Segment& segment, std::int64_t b);

// Writes row b's tokens to rows [first, first + segment_tokens) of k, v [Hkv, tokens, D] float32. `like` has the dtype
// that was quantised.
void dequantize(const Segment& segment, std::int64_t b, const Tensor& v_factor, const Tensor& like, const Tensor& k,
                const Tensor& v, std::int64_t first);

}  // namespace zipvl::cpu
