// The forward pass, in the way and the precision that a call wants.

#pragma once

#include "decode.h"

// In floats, or in bfloat16 where the machine has it and the tensors are, or the plan asks for it.
static Status attention(const Call& call) {
  // Not where a backward pass follows: it computes the same products in the same order.
  const bool few = call.rows <= kFewRows && !call.statistics;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Number, Bfloat16>)
    return few ? decode<uint32_t>(call) : forward<uint32_t, uint32_t>(call);
#endif
  if (few) return decode<float>(call);
#if defined(__AVX512BF16__)
  if constexpr (kMixedPrecision) {
    if (call.scores_in_bfloat16 && call.values_in_bfloat16)
      return forward<uint32_t, uint32_t>(call);
    if (call.scores_in_bfloat16) return forward<uint32_t, float>(call);
    if (call.values_in_bfloat16) return forward<float, uint32_t>(call);
  }
#endif
  return forward<float, float>(call);
}
