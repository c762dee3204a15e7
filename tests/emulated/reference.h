// What the tests of emulated kernels share: random numbers, and attention in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace emulated {

inline std::mt19937& generator() {
  static std::mt19937 engine(1);
  return engine;
}
inline float normal() { return std::normal_distribution<float>()(generator()); }
inline int uniform(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator()); }

struct Attended {
  std::vector<double> out;
  double lse;  // natural
};

// One query [head_dim] over the tokens whose keys and values are rows of `keys` and `values`.
inline Attended attend(const std::vector<double>& query, const std::vector<std::vector<double>>& keys,
                       const std::vector<std::vector<double>>& values) {
  Attended result{std::vector<double>(query.size(), 0.0), -INFINITY};
  std::vector<double> weights;
  double most = -INFINITY, sum = 0.0;
  for (const std::vector<double>& key : keys) {
    double score = 0.0;
    for (std::size_t d = 0; d < query.size(); ++d) {
      score += query[d] * key[d];
    }
    weights.push_back(score / std::sqrt(static_cast<double>(query.size())));
    most = std::max(most, weights.back());
  }
  for (double& weight : weights) {
    weight = std::exp(weight - most);
    sum += weight;
  }
  for (std::size_t t = 0; t < keys.size(); ++t) {
    for (std::size_t d = 0; d < query.size(); ++d) {
      result.out[d] += weights[t] / sum * values[t][d];
    }
  }
  if (!keys.empty()) {
    result.lse = most + std::log(sum);
  }
  return result;
}

// The largest difference of what a kernel gave; infinite where something is NaN that should not be.
inline double difference(double is, double should) {
  if (is == should) {
    return 0.0;
  }
  const double error = std::abs(is - should);
  return error == error ? error : INFINITY;
}

}  // namespace emulated
