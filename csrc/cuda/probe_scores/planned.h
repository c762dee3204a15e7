// What a plan says of a launch, in the launch's terms. No Torch.
#pragma once

#include <cstdint>

#include "cuda/probe_scores/plan.h"
#include "cuda/probe_scores/probe_scores.h"

namespace zipvl::cuda {

inline void take_plan(ProbeScoresParams& params, const plan::ProbeScoresCudaPlan& plan) {
  params.rows = static_cast<int>(plan.rows);
  params.rows_padded = static_cast<int>(plan.rows_padded);
  params.words = static_cast<int>(plan.words);
  params.cluster_blocks = static_cast<int>(plan.cluster_blocks);
  params.chunk_keys = static_cast<int>(plan.chunk_keys);
  params.splits = static_cast<int>(plan.splits);
  params.row_splits = static_cast<int>(plan.row_splits);
}

// bytes: device memory of space.bytes bytes, aligned to 256.
inline void place_workspace(ProbeScoresParams& params, const plan::ProbeScoresWorkspace& space, unsigned char* bytes) {
  params.probe_rows = bytes + space.probe_rows;
  params.row_limit = reinterpret_cast<std::int32_t*>(bytes + space.row_limit);
  params.unit_range = reinterpret_cast<std::int32_t*>(bytes + space.unit_range);
  params.mask_words =
      params.token_mask == nullptr ? nullptr : reinterpret_cast<std::uint32_t*>(bytes + space.mask_words);
  params.partial = reinterpret_cast<float*>(bytes + space.partial);
  params.row_lse = reinterpret_cast<float*>(bytes + space.row_lse);
  params.sums = reinterpret_cast<float*>(bytes + space.sums);
}

}  // namespace zipvl::cuda
