// Vectors of floats as wide as the machine's registers, by the compilers' own vector extension
// (GCC and Clang), so that one source serves AVX-512, AVX2, NEON and whatever has neither.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

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

// By the compilers' names: <cmath> takes a twentieth of a build.
static inline float exp_of(float x) { return __builtin_expf(x); }
static inline float log_of(float x) { return __builtin_logf(x); }
static inline float root_of(float x) { return __builtin_sqrtf(x); }
static inline double root_of(double x) { return __builtin_sqrt(x); }
static inline float floor_of(float x) { return __builtin_floorf(x); }
static inline double floor_of(double x) { return __builtin_floor(x); }

static inline Floats load(const float* at) { return *reinterpret_cast<const FloatsAt*>(at); }

static inline Words load(const uint32_t* at) { return *reinterpret_cast<const WordsAt*>(at); }

static inline void store(float* at, Floats value) { *reinterpret_cast<FloatsAt*>(at) = value; }

// x in every lane; subtracting zero leaves even -0 and NaN as they are.
static inline Floats all(float x) { return x - Floats{}; }

static inline Words all(uint32_t x) { return x - Words{}; }

// A product that is rounded before something is added to it: no fused operation takes both.
static inline Floats rounded(Floats product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#endif
  return product;
}

// NaN in `a` is lost, NaN in `b` is kept: the way of the machine's own instruction.
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// For each lane either a lane of `a`, or one of `b` (counted from kLanes on).
template <int... kFrom>
static inline Floats shuffled(Floats a, Floats b, std::integer_sequence<int, kFrom...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, Ints{kFrom...});
#endif
}

// Each lane beside the one kStep away from it.
template <int kStep, int... kLane>
static inline Floats swapped(Floats a, std::integer_sequence<int, kLane...>) {
  return shuffled(a, a, std::integer_sequence<int, (kLane ^ kStep)...>());
}

// From lane kFrom on, lanes of a and of b in turns.
template <int kFrom, int... kLane>
static inline Floats zipped(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return shuffled(a, b, std::integer_sequence<int, (kFrom + kLane / 2 + kLane % 2 * kLanes)...>());
}

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int kStep = kLanes / 2>
static inline float largest_of(Floats value) {
  if constexpr (kStep == 0) return value[0];
  else return largest_of<kStep / 2>(larger(value, swapped<kStep>(value, Lanes())));
}

template <int kStep = kLanes / 2>
static inline float sum_of(Floats value) {
  if constexpr (kStep == 0) return value[0];
  else return sum_of<kStep / 2>(value + swapped<kStep>(value, Lanes()));
}

// Of vectors a and b the pairs of lanes that lie kStep apart, added: those of a where a lane's bit
// kStep is 0, those of b where it is 1.
template <int kStep, int... kLane>
static inline Floats fold(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  using Low = std::integer_sequence<int, (kLane & kStep ? kLanes + kLane - kStep : kLane)...>;
  using High = std::integer_sequence<int, (kLane & kStep ? kLanes + kLane : kLane + kStep)...>;
  return shuffled(a, b, Low()) + shuffled(a, b, High());
}

// The sums of kLanes vectors, one in each lane.
template <int kStep = 1>
static inline Floats sums_of(const Floats* vectors) {
  if constexpr (kStep == kLanes) {
    return vectors[0];
  } else {
    Floats folded[kLanes / kStep / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / kStep / 2; ++i)
      folded[i] = fold<kStep>(vectors[2 * i], vectors[2 * i + 1], Lanes());
    return sums_of<2 * kStep>(folded);
  }
}

// 2^x for x <= 0; exactly 0 from -127 on, NaN for NaN. Relative error 2^-23.4, and 2^-13.3 for a
// result that is rounded to bfloat16 afterwards (2^-9).
//
// x = n + f with n whole and |f| <= 1/2: a polynomial gives 2^f (minimax under the condition that it
// is 1 at 0), 2^n is made of bits. Adding 1.5 * 2^23 rounds to whole numbers and leaves n in the low
// bits of the sum; at -127 the exponent's bits become 0: the number 0. (Adding n to the bits of 2^f
// would save an operation, and make numbers of some NaN.)
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
  return p * (Floats)(((Ints)whole + 127) << 23);
}
