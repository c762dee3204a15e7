// What the tests of emulated kernels share: cases and their report, random numbers, attention in float64, and codes of
// a quantised cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "common/quantized_block.h"

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

// Sets a code of `bits` bits, whatever stood there.
inline void put_code(std::uint8_t* codes, zipvl::quantized::CodePlace place, unsigned code, int bits) {
  const unsigned mask = (1U << place.width) - 1U;
  const auto put = [&](int word, unsigned part) {
    std::uint32_t x;
    std::memcpy(&x, codes + 4 * word, 4);
    x = (x & ~(mask << place.shift)) | part << place.shift;
    std::memcpy(codes + 4 * word, &x, 4);
  };
  put(place.word, code & mask);
  if (bits == 8) {
    put(place.word + zipvl::quantized::kUpperHalf, code >> 4);
  }
}

// A line for each thing checked.
struct Report {
  int wrong = 0;

  template <typename... Args>
  void operator()(bool right, const char* format, Args... args) {
    std::printf(format, args...);
    std::printf("%s\n", right ? "" : " WRONG");
    std::fflush(stdout);
    wrong += right ? 0 : 1;
  }
};

// What main() of a program does with its arguments CASES and SEED: check(report) so often. Its exit status.
template <typename Check>
int run_cases(int count, char** arguments, const Check& check) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s CASES SEED\n", arguments[0]);
    return 2;
  }
  generator().seed(static_cast<unsigned>(std::atoi(arguments[2])));
  Report report;
  for (int i = std::atoi(arguments[1]); i > 0; --i) {
    check(report);
  }
  std::printf("%d wrong\n", report.wrong);
  return report.wrong == 0 ? 0 : 1;
}

}  // namespace emulated
