// What the generated expressions call, each one without a branch.

#pragma once

#include "call.h"
#include "numbers.h"

template <typename Element>
static inline const Element* elements_of(const Call& call, int operand) {
  return static_cast<const Element*>(call.operands[operand].data);
}

static inline float to_float(double value) { return float(value); }

// Towards minus infinity.
template <typename A, typename B>
static inline auto floor_divide(A a, B b) {
  const auto quotient = a / b, rest = a % b;
  return quotient - ((rest != 0) & ((rest < 0) != (b < 0)));
}

// Of the divisor's sign.
template <typename A, typename B>
static inline auto modulo(A a, B b) {
  const auto rest = a % b;
  return rest + (((rest != 0) & ((rest < 0) != (b < 0))) ? b : 0);
}

template <typename A>
static inline A magnitude(A a) {
  return a < 0 ? -a : a;
}

// NaN in either comes through.
template <typename A, typename B>
static inline auto maximum(A a, B b) {
  return ((a > b) | (a != a)) ? a : b;
}

template <typename A, typename B>
static inline auto minimum(A a, B b) {
  return ((a < b) | (a != a)) ? a : b;
}

// 2^x for x <= 0, as exp2_of_negative (vectors.h).
static inline float exp2_of_negative(float x) {
  x = x < -127.0f ? -127.0f : x;
  const float whole = x + 12582912.0f;
  const float f = x - (whole - 12582912.0f);
  float p = 1.32647269e-3f * f + 9.67151266e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  return p * float_of_bits((bits_of(whole) + 127) << 23);
}

// Relative error 2^-23: x + x^3 P(x^2) near 0 (minimax), elsewhere by 2^(-2 |x| log2 e).
static inline float tanh_of(float x) {
  const float size = magnitude(x), square = x * x;
  float p = -5.89515801e-3f * square + 2.07959716e-2f;
  p = p * square - 5.37838303e-2f;
  p = p * square + 1.33319241e-1f;
  p = p * square - 3.3333298e-1f;
  const float near = x + x * square * p;
  const float shrunk = exp2_of_negative(-2.0f * kLog2e * size);
  const float far = (1.0f - shrunk) / (1.0f + shrunk);
  return size < 0.6f ? near : (x < 0 ? -far : far);
}
