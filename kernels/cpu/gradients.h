// Gradients of what the score and the sink read, as the generated source adds them up.

#pragma once

#include "expressions.h"

// OpenMP's own, whose header not every compiler brings.
extern "C" int omp_get_thread_num(void) noexcept;

// This thread's copy of an operand's gradient; null where nobody asks for it.
static inline float* gradient_of(const BackwardCall& backward, int operand) {
  if (!backward.gradients || !backward.gradients[operand].data) return nullptr;
  const OperandGradient& gradient = backward.gradients[operand];
  return gradient.data + omp_get_thread_num() * gradient.copy_stride;
}

static inline bool is_shared(const BackwardCall& backward, int operand) {
  return backward.gradients[operand].copy_stride == 0;
}

static inline void add(float* to, float value, bool shared) {
  if (shared) {
#pragma omp atomic
    *to += value;
  } else {
    *to += value;
  }
}
