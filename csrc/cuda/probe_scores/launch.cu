// The launch of probe_scores: what of k a family can read, and the choice of the instance.
#include "cuda/common/dispatch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/probe_scores/passes.h"

namespace zipvl::cuda {

bool probe_scores_fits_sm80(const ProbeScoresParams& params) {
  constexpr std::int64_t kPieceElements = 8;  // of the 16 bytes that cp.async copies
  const auto aligned = [&](int dim, int size) { return size == 1 || params.k_stride[dim] % kPieceElements == 0; };
  return reinterpret_cast<std::uintptr_t>(params.k) % 16 == 0 && aligned(0, params.batch) &&
         aligned(1, params.kv_heads) && aligned(2, params.tokens);
}

cudaError_t launch_probe_scores_sm80(const ProbeScoresParams& params, cudaStream_t stream) {
  return dispatch(params.element, params.head_dim, [&]<typename ElementType, int HeadDim>() {
    return probe_scores::launch_passes<probe_scores::sm80::Passes<ElementType, HeadDim>>(params, stream);
  });
}

#ifdef ZIPVL_HAS_SM90
bool probe_scores_fits_sm90(const ProbeScoresParams& params) {
  return tensor_map_fits({params.k,
                          params.element,
                          {static_cast<std::uint64_t>(params.head_dim), static_cast<std::uint64_t>(params.tokens),
                           static_cast<std::uint64_t>(params.kv_heads), static_cast<std::uint64_t>(params.batch)},
                          {params.k_stride[2], params.k_stride[1], params.k_stride[0]},
                          {1, 1, 1, 1}});
}

cudaError_t launch_probe_scores_sm90(const ProbeScoresParams& params, cudaStream_t stream) {
  return dispatch(params.element, params.head_dim, [&]<typename ElementType, int HeadDim>() {
    return probe_scores::launch_passes<probe_scores::sm90::Passes<ElementType, HeadDim>>(params, stream);
  });
}
#endif

}  // namespace zipvl::cuda
