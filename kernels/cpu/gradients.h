// Gradients of what the score and the sink read, as the generated source adds them up.

#pragma once

#include "expressions.h"

// OpenMP's own, whose header not every compiler brings.
extern "C" int omp_get_thread_num(void) noexcept;

// Sums of an operand's gradient, as one thread adds to them. A number that many scores read (one for
// each head, say) is a sum of so many terms that float32 would lose digits; what all threads share is
// large, so that few terms meet in one place.
struct GradientSums {
  double* own;    // this thread's copy, or null:
  float* shared;  // that of all threads

  explicit operator bool() const { return own || shared; }

  void add(int64_t place, double value) const {
    if (own) {
      own[place] += value;
    } else {
#pragma omp atomic
      shared[place] += float(value);
    }
  }
};

// False where nobody asks for the gradient.
static inline GradientSums gradient_of(const BackwardCall& backward, int operand) {
  if (!backward.gradients) return {nullptr, nullptr};
  const OperandGradient& gradient = backward.gradients[operand];
  if (gradient.copy_stride == 0) return {nullptr, static_cast<float*>(gradient.data)};
  return {static_cast<double*>(gradient.data) + omp_get_thread_num() * gradient.copy_stride, nullptr};
}
