// Token selection by a cluster of blocks a row on a CPU, against one block on the same scores, which selection.cpp
// checks against what they ask for.
//
//   selection_sm90 CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "cuda/select_tokens/select_tokens.cu"
#include "cuda/select_tokens/sm90/select_tokens_cluster.cu"

#include <memory>

#include "cuda_on_cpu.h"
#include "hopper_host.h"
#include "reference.h"

namespace zipvl::cuda::select_tokens {
namespace {
alignas(128) thread_local uint4 dynamic_shared[emulated::kSharedBytes / sizeof(uint4)];
const emulated::DynamicShared registered(reinterpret_cast<unsigned char*>(dynamic_shared));
}  // namespace
}  // namespace zipvl::cuda::select_tokens

namespace {

using namespace zipvl::cuda;
using emulated::uniform;

constexpr int kMaxTokens = 16384;  // of one block

// Bools, which std::vector has no pointer to.
std::unique_ptr<bool[]> draw_mask(int size, int one_in) {
  std::unique_ptr<bool[]> mask(new bool[size]);
  for (int i = 0; i < size; ++i) {
    mask[i] = uniform(1, one_in) == 1;
  }
  return mask;
}

float draw_score(int kind) {
  switch (kind) {
    case 0:
      return static_cast<float>(uniform(0, 3));  // ties
    case 1:
      return uniform(0, 9) == 0 ? std::exp(emulated::normal()) : 0.0F;
    case 2:
      return emulated::normal();  // negative ones too
    default:
      return std::exp(4.0F * emulated::normal());
  }
}

void check(emulated::Report& report) {
  const int blocks = 2 << uniform(0, 2), each = uniform(0, 1) == 0 ? 4096 : 8192;
  const int batch = uniform(1, 2), tokens = uniform(1, std::min(kMaxTokens, blocks * each)), kind = uniform(0, 4);
  std::vector<float> scores(2 * batch * tokens);
  for (float& score : scores) {
    score = draw_score(kind);
  }
  if (uniform(0, 7) == 0) {
    scores[uniform(0, batch * tokens - 1)] = uniform(0, 1) == 0 ? NAN : INFINITY;
  }
  const auto real = draw_mask(batch * tokens, 2), kept = draw_mask(batch * tokens, 50);
  SelectTokensParams params{};
  params.budget_score = scores.data();
  params.rank_score = scores.data() + batch * tokens;
  params.token_mask = uniform(0, 1) == 0 ? real.get() : nullptr;
  params.keep_mask = uniform(0, 1) == 0 ? kept.get() : nullptr;
  params.keep_last = params.token_mask == nullptr ? uniform(0, std::min(tokens, 9)) : 0;
  for (auto* stride : {params.budget_stride, params.rank_stride, params.mask_stride, params.keep_stride}) {
    stride[0] = tokens;
    stride[1] = 1;
  }
  params.batch = batch;
  params.tokens = tokens;
  params.min_tokens = uniform(0, std::min(tokens, 20));
  params.tau = 0.5 + 0.1 * uniform(0, 5);
  params.ratio = uniform(0, 1) == 0 ? 0.1 * uniform(1, 10) : 0.0;
  params.max_ratio = 1.0;
  std::vector<std::int32_t> index[2], count[2];
  for (const bool cluster : {false, true}) {
    index[cluster].assign(batch * tokens, -7);
    count[cluster].assign(batch, -7);
    params.index = index[cluster].data();
    params.count = count[cluster].data();
    params.blocks_per_row = cluster ? blocks : 1;
    params.tokens_per_block = cluster ? each : kMaxTokens;
    cluster ? launch_select_tokens_cluster(params, nullptr) : launch_select_tokens(params, nullptr);
  }
  report(index[0] == index[1] && count[0] == count[1] && count[0][0] >= 0,
         "%d rows of %5d tokens by %d blocks of %d, scores of kind %d, %s %.1f%s%s: %d", batch, tokens, blocks, each,
         kind, params.ratio > 0.0 ? "ratio" : "tau", params.ratio > 0.0 ? params.ratio : params.tau,
         params.token_mask != nullptr ? ", masked" : "", params.keep_mask != nullptr ? ", some kept" : "", count[0][0]);
}

}  // namespace

extern "C" cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorNotSupported;  // blocks that wait for each other
}
extern "C" cudaError_t cudaMemset2DAsync(void*, std::size_t, int, std::size_t, std::size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

int main(int count, char** arguments) { return emulated::run_cases(count, arguments, check); }
