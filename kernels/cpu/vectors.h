// Vectors of floats as wide as the machine's registers, by the compilers' own vector extension
// (GCC and Clang), so that one source serves AVX-512, AVX2, NEON and whatever has neither.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
// The same in memory, where nothing is known of alignment.
typedef float FloatsAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t WordsAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

static inline Floats load(const float* at) { return *reinterpret_cast<const FloatsAt*>(at); }

static inline void store(float* at, Floats value) { *reinterpret_cast<FloatsAt*>(at) = value; }

// x in every lane; subtracting zero leaves even -0 and NaN as they are.
static inline Floats all(float x) { return x - Floats{}; }

// NaN in `a` is lost, NaN in `b` is kept: the way of the machine's own instruction.
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline float largest_of(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane)
      lanes[lane] = lanes[lane] > lanes[lane + width] ? lanes[lane] : lanes[lane + width];
  return lanes[0];
}

static inline float sum_of(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// 2^x for x <= 0; exactly 0 from -127 on, NaN for NaN. Relative error 2^-23.4, and 2^-13.3 for a
// result that is rounded to bfloat16 afterwards (2^-9).
//
// x = n + f with n whole and |f| <= 1/2: a polynomial gives 2^f (minimax under the condition that it
// is 1 at 0), and n is added to its exponent. Adding 1.5 * 2^23 rounds to whole numbers and leaves n
// in the low bits of the sum. At x = -127 the exponent's bits become 0: the number 0.
template <bool kCoarse>
static inline Floats exp2_of_negative(Floats x) {
  const Floats rounding = all(12582912.0f);
  const Floats least = all(-127.0f);
  x = x < least ? least : x;
  const Floats whole = x + rounding;
  const Floats f = x - (whole - rounding);
  Floats p;
  if constexpr (kCoarse) {
    p = 5.50089289e-2f * f + 2.4221096e-1f;
    p = p * f + 6.93282928e-1f;
  } else {
    p = 1.32647269e-3f * f + 9.67151266e-3f;
    p = p * f + 5.55073374e-2f;
    p = p * f + 2.40222421e-1f;
    p = p * f + 6.93146978e-1f;
  }
  p = p * f + 1.0f;
  return (Floats)((Ints)p + ((Ints)whole << 23));
}
