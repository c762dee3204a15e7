// What the tests of emulated kernels share: cases and their report, random numbers, attention in float64, and codes of
// a quantised cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/quantized_block.h"

namespace emulated {

void seed(unsigned from);
float normal();
int uniform(int least, int most);

// What only programs without sanitizers do fast, and so is in reference.cpp, for float, __half and __nv_bfloat16:
// random numbers of an array, and an array in float64.
template <typename Element>
void fill_normal(std::vector<Element>& values);
template <typename Element>
std::vector<double> widened(const std::vector<Element>& values);

double dot(const double* x, const double* y, int size);

struct Attended {
  std::vector<double> out;
  double lse;  // natural
};

// One query [head_dim] over tokens, whose keys and values [head_dim] begin where `keys` and `values` say.
Attended attend(const double* query, int head_dim, const std::vector<const double*>& keys,
                const std::vector<const double*>& values);

// The largest difference of what a kernel gave; infinite where something is NaN that should not be.
inline double difference(double is, double should) {
  if (is == should) {
    return 0.0;
  }
  const double error = std::abs(is - should);
  return error == error ? error : INFINITY;
}
// Of as many as there should be.
double difference(const double* is, const std::vector<double>& should);

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
  seed(static_cast<unsigned>(std::atoi(arguments[2])));
  Report report;
  for (int i = std::atoi(arguments[1]); i > 0; --i) {
    check(report);
  }
  std::printf("%d wrong\n", report.wrong);
  return report.wrong == 0 ? 0 : 1;
}

}  // namespace emulated
