#include "cuda/probe_scores/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/probe_scores/passes.h"

namespace zipvl::cuda {
bool probe_scores_fits_sm90(const ProbeScoresParams& params) {
  return tensor_map_fits({params.k,
                          params.element,
                          {static_cast<std::uint64_t>(params.head_dim), static_cast<std::uint64_t>(params.tokens),
                           static_cast<std::uint64_t>(params.kv_heads), static_cast<std::uint64_t>(params.batch)},
                          {params.k_stride[2], params.k_stride[1], params.k_stride[0]},
                          {1, 1, 1, 1}});
}

cudaError_t launch_probe_scores_sm90(const ProbeScoresParams& params, cudaStream_t stream) {
  return launch_passes<probe::sm90::Passes>(params, stream);
}

}  // namespace zipvl::cuda
