#include "cuda/probe_scores/sm90/launch_passes.cuh"

namespace zipvl::cuda::probe::sm90 {
template cudaError_t launch_first_pass<__half, 64>(const ProbeScoresParams&, cudaStream_t);
template cudaError_t launch_second_pass<__half, 64>(const ProbeScoresParams&, cudaStream_t);
template cudaError_t launch_both_passes<__half, 64>(const ProbeScoresParams&, cudaStream_t);
template cudaError_t launch_first_pass<__nv_bfloat16, 64>(const ProbeScoresParams&, cudaStream_t);
template cudaError_t launch_second_pass<__nv_bfloat16, 64>(const ProbeScoresParams&, cudaStream_t);
template cudaError_t launch_both_passes<__nv_bfloat16, 64>(const ProbeScoresParams&, cudaStream_t);
}  // namespace zipvl::cuda::probe::sm90
