// Messages from parts, without streams: a toolchain that links the C++ library into each shared object leaves a process
// with several copies of the streams' locale, and writing a number through the wrong one crashes (seen with g++ 13 and
// both op libraries in one process).
#pragma once

#include <cstdio>
#include <string>
#include <type_traits>

namespace zipvl {

inline void append_text(std::string& text, const char* part) { text += part; }
inline void append_text(std::string& text, const std::string& part) { text += part; }

template <typename Number, typename = std::enable_if_t<std::is_arithmetic_v<Number>>>
void append_text(std::string& text, Number part) {
  if constexpr (std::is_floating_point_v<Number>) {
    constexpr int kMaxCharacters = 32;  // "%g" gives at most 13
    char number[kMaxCharacters];
    std::snprintf(number, sizeof(number), "%g", static_cast<double>(part));
    text += number;
  } else {
    text += std::to_string(part);
  }
}

// Strings, integers and floating-point numbers (six digits), one after the other.
template <typename... Parts>
std::string join(const Parts&... parts) {
  std::string text;
  (append_text(text, parts), ...);
  return text;
}

}  // namespace zipvl
