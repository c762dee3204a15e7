// probe_scores as its programs check it: a random layer, its probes, the launch of a family, and float64.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <memory>
#include <type_traits>

#include "common/probe_draw.h"
#include "cuda/probe_index/params.h"
#include "cuda/probe_scores/params.h"
#include "cuda_on_cpu.h"
#include "reference.h"

namespace emulated {

struct Case {
  int batch, query_heads, kv_heads, tokens, recent, random;
  bool causal, masked;
  std::uint64_t seed;
  double tau, ratio;

  int probes() const { return recent + random; }
};

inline Case random_case(int min_tokens = 1, int max_tokens = 500) {
  const int kv_heads = uniform(1, 3), groups[] = {1, 2, 3, 7};
  Case c{uniform(1, 3),
         kv_heads * groups[uniform(0, 3)],
         kv_heads,
         uniform(min_tokens, max_tokens),
         uniform(1, 40),
         uniform(0, 40),
         uniform(0, 3) != 0,
         uniform(0, 1) == 0,
         static_cast<std::uint64_t>(uniform(0, 1 << 30)),
         0.5 + 0.1 * uniform(0, 4),
         0.0};
  c.ratio = uniform(0, 1) == 0 ? 0.1 * uniform(1, 10) : 0.0;
  return c;
}

template <typename Token, int D>
struct ScoredLayer {
  Case c;
  std::vector<Token> q, k;
  std::unique_ptr<bool[]> mask;
  std::vector<std::int32_t> probes;
  std::vector<float> accumulated, normalized;
  std::vector<unsigned char> workspace;
  zipvl::cuda::ProbeScoresParams scores{};

  explicit ScoredLayer(const Case& of) : c(of), mask(new bool[c.batch * c.tokens]) {
    fill(q, static_cast<std::size_t>(c.batch) * c.query_heads * c.tokens * D);
    fill(k, static_cast<std::size_t>(c.batch) * c.kv_heads * c.tokens * D);
    for (int i = 0; i < c.batch * c.tokens; ++i) {
      mask[i] = !c.masked || uniform(0, 4) != 0;
    }
  }

  static void fill(std::vector<Token>& rows, std::size_t size) {
    rows.resize(size);
    fill_normal(rows);
  }

  bool real(int b, int n) const { return mask[b * c.tokens + n]; }

  // Probes: the same positions.
  bool probe_index() {
    probes.assign(c.batch * c.probes(), -7);
    zipvl::cuda::ProbeIndexParams params{};
    params.out = probes.data();
    params.token_mask = c.masked ? mask.get() : nullptr;
    params.mask_stride[0] = c.tokens;
    params.mask_stride[1] = 1;
    params.batch = c.batch;
    params.tokens = c.tokens;
    params.num_recent = c.recent;
    params.num_random = c.random;
    params.seed = c.seed;
    zipvl::cuda::launch_probe_index(params, nullptr);
    bool right = true;
    for (int b = 0; b < c.batch; ++b) {
      std::vector<int> positions;
      for (int n = 0; n < c.tokens; ++n) {
        if (real(b, n)) {
          positions.push_back(n);
        }
      }
      const zipvl::ProbeSplit split =
          zipvl::split_probes(static_cast<std::int64_t>(positions.size()), c.recent, c.random);
      for (int slot = 0; slot < c.probes(); ++slot) {
        const bool there = slot < split.random + split.recent;
        const int should = there ? positions[zipvl::probe_rank(split, c.seed, c.random, slot)] : -1;
        right = right && probes[b * c.probes() + slot] == should;
      }
    }
    return right;
  }

  // Scores: the largest error, relative to the row's largest score. launch(params): a family's kernels; clusters: they
  // may be those of one kernel for both passes.
  template <typename Launch>
  double probe_scores(const Launch& launch, bool clusters) {
    accumulated.assign(c.batch * c.tokens, NAN);
    normalized.assign(c.batch * c.tokens, NAN);
    const auto plan = zipvl::plan::plan_probe_scores_cuda(
        {c.batch, c.query_heads, c.kv_heads, c.tokens, c.probes(), D, c.masked, clusters});
    workspace.assign(plan.workspace.bytes + 256, 0xFF);
    auto* bytes =
        reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(workspace.data()) + 255) / 256 * 256);
    zipvl::cuda::ProbeScoresParams& params = scores;
    params.q = q.data();
    params.k = k.data();
    const std::int64_t heads[] = {c.query_heads, c.kv_heads};
    for (auto* strides : {params.q_stride, params.k_stride}) {
      strides[2] = D;
      strides[1] = std::int64_t{c.tokens} * D;
      strides[0] = heads[strides == params.k_stride] * strides[1];
    }
    params.probe_index = probes.data();
    params.probe_stride[0] = c.probes();
    params.probe_stride[1] = 1;
    params.token_mask = c.masked ? mask.get() : nullptr;
    params.mask_stride[0] = c.tokens;
    params.mask_stride[1] = 1;
    params.accumulated = accumulated.data();
    params.normalized = normalized.data();
    zipvl::cuda::place_workspace(params, plan.workspace, bytes);
    zipvl::cuda::take_plan(params, plan);
    params.element = std::is_same_v<Token, __half> ? zipvl::cuda::Element::kFloat16 : zipvl::cuda::Element::kBFloat16;
    params.head_dim = D;
    params.batch = c.batch;
    params.query_heads = c.query_heads;
    params.kv_heads = c.kv_heads;
    params.tokens = c.tokens;
    params.probes = c.probes();
    params.causal = c.causal;
    params.scale_log2 = 1.4426950408889634F / std::sqrt(static_cast<float>(D));
    params.num_sms = 132;
    launch(params);
    const std::vector<double> wide_q = widened(q), wide_k = widened(k);
    double worst = 0.0;
    for (int b = 0; b < c.batch; ++b) {
      worst = std::max(worst, score_error(b, wide_q, wide_k));
    }
    return worst;
  }

  double score_error(int b, const std::vector<double>& wide_q, const std::vector<double>& wide_k) const {
    std::vector<double> sum(c.tokens, 0.0);
    std::vector<int> viewers(c.tokens, 0);
    for (int slot = 0; slot < c.probes(); ++slot) {
      const int position = probes[b * c.probes() + slot];
      if (position < 0) {
        continue;
      }
      const auto sees = [&](int n) { return real(b, n) && (!c.causal || n <= position); };
      for (int n = 0; n < c.tokens; ++n) {
        viewers[n] += sees(n) ? 1 : 0;
      }
      for (int head = 0; head < c.query_heads; ++head) {
        const double* query = &wide_q[((static_cast<std::size_t>(b) * c.query_heads + head) * c.tokens + position) * D];
        const std::size_t kv = static_cast<std::size_t>(b) * c.kv_heads + head / (c.query_heads / c.kv_heads);
        std::vector<double> weights(c.tokens, 0.0);
        double total = 0.0;
        for (int n = 0; n < c.tokens; ++n) {
          if (sees(n)) {
            const double score = dot(query, &wide_k[(kv * c.tokens + n) * D], D);
            weights[n] = std::exp(score / std::sqrt(static_cast<double>(D)));
            total += weights[n];
          }
        }
        for (int n = 0; n < c.tokens && total > 0.0; ++n) {
          sum[n] += weights[n] / total / c.query_heads;
        }
      }
    }
    const double largest = std::max(1e-30, *std::max_element(sum.begin(), sum.end()));
    double worst = 0.0;
    for (int n = 0; n < c.tokens; ++n) {
      const double share = viewers[n] > 0 ? sum[n] / viewers[n] : 0.0;
      worst = std::max({worst, difference(accumulated[b * c.tokens + n], sum[n]) / largest,
                        difference(normalized[b * c.tokens + n], share) / largest});
    }
    return worst;
  }
};

}  // namespace emulated
