// How probe_scores runs over its CUDA kernels, if they take it: the tiles both passes share, how finely each is split,
// and the workspace; or the one kernel that takes short inputs. Nothing here depends on the batch size but the
// workspace, so that a row's result does not depend on its company.
#pragma once

#include <cstdint>
#include <string>

namespace zipvl::plan {

constexpr std::int64_t kProbeMaxProbes = 256;  // a thread each in the kernels that read them

// Tiles of probe_scores' kernels. Rows are the probes of one key/value head's query heads: row = probe * group + head.
constexpr std::int64_t kProbeUnitRows = 64;       // rows that share one range of limits: M of a wgmma
constexpr std::int64_t kProbeRowAlignment = 128;  // rows are padded to the widest tile that streams
constexpr std::int64_t kProbeTileKeys = 128;      // granule of the key chunks of the first pass
constexpr std::int64_t kProbeBlockRows = 256;     // rows (first pass) or keys (second) that a block holds on to

// One kernel for both passes (Hopper): a cluster of blocks takes some units of one head's rows, and each of its blocks
// keeps its share of the keys in shared memory from the first pass to the second.
constexpr std::int64_t kProbeClusterBlocks = 8;  // every sm_90 device takes as many
constexpr std::int64_t kProbeClusterUnits = 5;   // of rows, one a warpgroup

// Keys a block of a cluster holds: beside 320 rows, what 227 KiB take. At D 256 that is nothing.
constexpr std::int64_t probe_cluster_keys(std::int64_t head_dim) {
  return head_dim <= 64 ? 1024 : head_dim <= 128 ? 512 : 0;
}

struct ProbeScoresCudaProblem {
  std::int64_t batch, query_heads, kv_heads, tokens, probes, head_dim;
  bool masked;
  bool clusters;               // Hopper's kernels run
  bool half_precision = true;  // float16 or bfloat16
  bool aligned = true;         // every row of k begins at a multiple of 16 bytes
};

// Byte offsets into the workspace, each a multiple of 256. Where one kernel takes both passes, all but the sums are
// empty.
struct ProbeScoresWorkspace {
  std::int64_t probe_rows;  // [B, Hkv, rows, D] of q's 16-bit dtype
  std::int64_t row_limit;   // [B, rows_padded] int32
  std::int64_t unit_range;  // [B, rows_padded / kProbeUnitRows, 2] int32
  std::int64_t mask_words;  // [B, words] uint32; unused where there is no mask
  std::int64_t partial;     // [B, Hkv, splits, rows_padded, 2] float32
  std::int64_t row_lse;     // [B, Hkv, rows_padded] float32
  std::int64_t sums;        // [B, Hkv, row_splits, N] float32
  std::int64_t bytes;
};

struct ProbeScoresCudaPlan {
  std::string reason;              // why no kernel takes the problem: all else is 0 then; or empty
  std::int64_t rows, rows_padded;  // of one key/value head
  std::int64_t cluster_blocks;     // of the kernel that takes both passes; 0: two kernels, with others around them
  std::int64_t words;              // of the packed token mask of a batch row
  std::int64_t chunk_keys;         // of one item of the first pass
  std::int64_t splits;             // chunks of a row
  std::int64_t row_splits;         // parts of the rows in the second pass; clusters of a head
  std::int64_t first_items, second_items;  // of two kernels
  ProbeScoresWorkspace workspace;
  double flops, exponentials;  // of both passes, without what causal hides

  std::string describe() const;
};

ProbeScoresCudaPlan plan_probe_scores_cuda(const ProbeScoresCudaProblem& problem);

}  // namespace zipvl::plan
