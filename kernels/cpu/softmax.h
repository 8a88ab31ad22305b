// Online softmax of one block of query rows: a running maximum and sum for each row.
//
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
// "FlashAttention", 2022, algorithm 1.

#pragma once

#include "numbers.h"
#include "vectors.h"

struct RowState {
  float largest = -kInfinity;  // of the scores so far
  Floats sum = {};             // of exp(score - largest), by lanes
};

// exp(x) for x <= 0, as exp2_of_negative has it.
template <bool kCoarse>
static inline Floats exp_of_negative(Floats x) {
  return exp2_of_negative<kCoarse>(x * kLog2e);
}

// A score: a product times the scale, or times 1 where that is done. It is rounded before anything is
// taken from it, as the maximum was: without that, of scores so huge that one rounding is more than 1,
// the largest would lie beside its own maximum.
static inline Floats scored(Floats product, float factor) {
  return kScaleIsExact ? product * factor : rounded(product * factor);
}

// Scores of one row become weights, exp(factor * score - largest), in blocks of kBlock keys; returns
// what earlier sums and outputs of the row must be multiplied by. `kept`, where it is not null, is
// what dropout multiplies each weight by, after it was summed.
template <int kBlock, typename Weight>
static inline float weigh_row(RowState& state, const float* scores, const float* factor,
                              int64_t blocks, const float* kept, Weight* weights) {
  float largest = state.largest;
  for (int64_t block = 0; block < blocks; ++block) {
    Floats seen = load(scores + block * kBlock);
    for (int lane = kLanes; lane < kBlock; lane += kLanes)
      seen = larger(load(scores + block * kBlock + lane), seen);
    const float here = factor[block] * largest_of(seen);
    if (!(here <= largest)) largest = here;  // NaN comes through
  }
  if (largest == -kInfinity) {
    // NaN is less than nothing for `larger`: it may be all that the row has.
    for (int64_t key = 0; key < blocks * kBlock; ++key)
      if (scores[key] != scores[key]) largest = kNaN;
  }
  if (largest == -kInfinity) {
    for (int64_t key = 0; key < blocks * kBlock; key += kLanes)
      store_rounded(weights + key, Floats{});
    return 1.0f;
  }
  const float scale = state.largest == -kInfinity ? 0.0f : std::exp(state.largest - largest);
  Floats sum = state.sum * scale;
  for (int64_t block = 0; block < blocks; ++block)
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      const int64_t key = block * kBlock + lane;
      const Floats x = scored(load(scores + key), factor[block]) - largest;
      const Floats weight = exp_of_negative<!std::is_same_v<Weight, float>>(x);
      sum += weight;
      store_rounded(weights + key, kept ? weight * load(kept + key) : weight);
    }
  state.sum = sum;
  state.largest = largest;
  return scale;
}
