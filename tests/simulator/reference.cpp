// The bodies of reference.h, which no sanitizer slows down.
#include "reference.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <random>

namespace emulated {
namespace {

std::mt19937 generator(1);

}  // namespace

void seed(unsigned from) { generator.seed(from); }
float normal() { return std::normal_distribution<float>()(generator); }
int uniform(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

template <typename Element>
void fill_normal(std::vector<Element>& values) {
  for (Element& value : values) {
    value = Element(normal());
  }
}

template <typename Element>
std::vector<double> widened(const std::vector<Element>& values) {
  std::vector<double> wide(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    wide[i] = static_cast<float>(values[i]);
  }
  return wide;
}

template void fill_normal(std::vector<float>&);
template void fill_normal(std::vector<__half>&);
template void fill_normal(std::vector<__nv_bfloat16>&);
template std::vector<double> widened(const std::vector<float>&);
template std::vector<double> widened(const std::vector<__half>&);
template std::vector<double> widened(const std::vector<__nv_bfloat16>&);

double dot(const double* x, const double* y, int size) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < size; ++i) {
    sum += x[i] * y[i];
  }
  return sum;
}

Attended attend(const double* query, int head_dim, const std::vector<const double*>& keys,
                const std::vector<const double*>& values) {
  Attended result{std::vector<double>(head_dim, 0.0), -INFINITY};
  std::vector<double> weights;
  weights.reserve(keys.size());
  double most = -INFINITY, sum = 0.0;
  for (const double* key : keys) {
    weights.push_back(dot(query, key, head_dim) / std::sqrt(static_cast<double>(head_dim)));
    most = std::max(most, weights.back());
  }
  for (double& weight : weights) {
    weight = std::exp(weight - most);
    sum += weight;
  }
  for (std::size_t t = 0; t < keys.size(); ++t) {
    const double share = weights[t] / sum;
#pragma omp simd
    for (int d = 0; d < head_dim; ++d) {
      result.out[d] += share * values[t][d];
    }
  }
  if (!keys.empty()) {
    result.lse = most + std::log(sum);
  }
  return result;
}

double difference(const double* is, const std::vector<double>& should) {
  double worst = 0.0;
  for (std::size_t i = 0; i < should.size(); ++i) {
    worst = std::max(worst, difference(is[i], should[i]));
  }
  return worst;
}

}  // namespace emulated
