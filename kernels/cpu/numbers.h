// The number formats of tensors, and how they become floats and back.

#pragma once

#include <type_traits>

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

static inline void store_rounded(float* at, Floats values) { store(at, values); }

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#if defined(__AVX512BF16__)
// The instructions by their names: the header of the intrinsics takes a fifth of a build.
static inline Halves rounded_halves(Floats values) {
  Halves halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(values));
  return halves;
}

static inline void store_rounded(Bfloat16* at, Floats values) {
  const Halves halves = rounded_halves(values);
  std::memcpy(at, &halves, sizeof halves);
}

// Lane by lane two bfloat16 in a word.
static inline void store_pairs(uint32_t* at, Floats low, Floats high) {
  const Words first = __builtin_convertvector(rounded_halves(low), Words);
  const Words second = __builtin_convertvector(rounded_halves(high), Words);
  *reinterpret_cast<WordsAt*>(at) = first | second << 16;
}
#else
static inline void store_rounded(Bfloat16* at, Floats values) {
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = from_float<Bfloat16>(values[lane]);
}

static inline void store_pairs(uint32_t* at, Floats low, Floats high) {
  for (int lane = 0; lane < kLanes; ++lane)
    at[lane] = uint32_t(from_float<Bfloat16>(low[lane]).bits) |
               uint32_t(from_float<Bfloat16>(high[lane]).bits) << 16;
}
#endif

// kLanes elements as floats.
static inline Floats load_floats(const float* from) { return load(from); }

static inline Floats load_floats(const Bfloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

#if defined(__FLT16_MAX__)
static inline Floats load_floats(const Float16* from) {
  typedef Float16 Float16s __attribute__((vector_size(2 * kLanes)));
  Float16s halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Floats);
}
#endif

// kLanes elements from `at` of a row of kDim, those beyond it 0.
template <int kDim, typename Number>
static inline Floats load_some(const Number* row, int at) {
  if (at + kLanes <= kDim) return load_floats(row + at);
  float elements[kLanes] = {};
  for (int lane = 0; lane < kDim - at; ++lane) elements[lane] = to_float(row[at + lane]);
  return load(elements);
}
