// The number formats of tensors, and how they become floats and back.

#pragma once

#include "vectors.h"

struct Bfloat16 {
  uint16_t bits;
};

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(float value) { return value; }

static inline float to_float(Bfloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }

template <typename Number>
static inline Number from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// To nearest, ties to even; NaN stays NaN.
template <>
inline Bfloat16 from_float<Bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(value != value ? 0x7fc0u : rounded)};
}

#if defined(__FLT16_MAX__)
using Float16 = _Float16;

static inline float to_float(Float16 value) { return float(value); }

template <>
inline Float16 from_float<Float16>(float value) {
  return Float16(value);
}
#endif
