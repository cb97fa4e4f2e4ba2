// bfloat16 storage and the accumulator type of each activation type.
#pragma once
#include <cstdint>
#include <cstring>

namespace ifr::IFR_ISA {

struct bf16 {
  uint16_t bits;
};

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(bf16 v) {
  uint32_t word = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

template <typename To, typename From>
inline To store(From v) {
  return To(v);
}
// Round to nearest even; a NaN stays a NaN (its payload could otherwise round to infinity).
template <>
inline bf16 store<bf16, float>(float v) {
  uint32_t word;
  std::memcpy(&word, &v, 4);
  uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  return bf16{uint16_t(v != v ? 0x7fc0u : rounded)};
}
template <>
inline bf16 store<bf16, double>(double v) {
  return store<bf16, float>(float(v));
}

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

}  // namespace ifr::IFR_ISA
