#include "cuda/probe_scores/sm80/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/probe_scores/passes.h"

namespace zipvl::cuda {

bool probe_scores_fits_sm80(const ProbeScoresParams& params) {
  constexpr std::int64_t kPieceElements = 8;  // of the 16 bytes that cp.async copies
  const auto aligned = [&](int dim, int size) { return size == 1 || params.k_stride[dim] % kPieceElements == 0; };
  return reinterpret_cast<std::uintptr_t>(params.k) % 16 == 0 && aligned(0, params.batch) &&
         aligned(1, params.kv_heads) && aligned(2, params.tokens);
}

cudaError_t launch_probe_scores_sm80(const ProbeScoresParams& params, cudaStream_t stream) {
  return launch_passes<probe::sm80::Passes>(params, stream);
}

}  // namespace zipvl::cuda
