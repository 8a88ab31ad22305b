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

// The largest of one row's scores in a block. NaN may be lost.
template <int kBlock>
static inline float largest_in_block(const float* scores, float factor) {
  Floats seen = load(scores);
  for (int lane = kLanes; lane < kBlock; lane += kLanes) seen = larger(load(scores + lane), seen);
  return factor * largest_of(seen);
}

// Scores of one row become weights, exp(factor * score - largest), in blocks of kBlock keys; returns
// what earlier sums and outputs of the row must be multiplied by. `largest` is that of these scores
// and the earlier ones. Blocks whose bit is in `skipped` get weights of 0. `kept`, where it is not
// null, is what dropout multiplies each weight by, after it was summed.
template <int kBlock, typename Weight>
static inline float weigh_below(float largest, RowState& state, const float* scores,
                                const float* factor, int64_t blocks, uint32_t skipped,
                                const float* kept, Weight* weights) {
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
  const float scale = state.largest == -kInfinity ? 0.0f : exp_of(state.largest - largest);
  Floats sum = state.sum * scale;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int lane = 0; lane < kBlock && skipped >> block & 1; lane += kLanes)
      store_rounded(weights + block * kBlock + lane, Floats{});
    for (int lane = 0; lane < kBlock && !(skipped >> block & 1); lane += kLanes) {
      const int64_t key = block * kBlock + lane;
      const Floats x = scored(load(scores + key), factor[block]) - largest;
      const Floats weight = exp_of_negative<!std::is_same_v<Weight, float>>(x);
      sum += weight;
      store_rounded(weights + key, kept ? weight * load(kept + key) : weight);
    }
  }
  state.sum = sum;
  state.largest = largest;
  return scale;
}

// The same with all blocks, where the largest is still to be found.
template <int kBlock, typename Weight>
static inline float weigh_row(RowState& state, const float* scores, const float* factor,
                              int64_t blocks, const float* kept, Weight* weights) {
  float largest = state.largest;
  for (int64_t block = 0; block < blocks; ++block) {
    const float here = largest_in_block<kBlock>(scores + block * kBlock, factor[block]);
    if (!(here <= largest)) largest = here;  // NaN comes through
  }
  return weigh_below<kBlock>(largest, state, scores, factor, blocks, 0, kept, weights);
}

// The blocks (as bits) that a row leaves out: those whose scores lie by more than `skip` below the
// largest that the row has met up to now, these scores included. What it keeps thus holds that largest,
// of weight 1, and each weight that it leaves out is below exp(-skip): of n keys left out the share is at
// most n exp(-skip). A row that has met no key leaves out nothing, nor a block with a score that is NaN.
// Each row for itself: what comes later changes nothing before. Blocks in `known` (as bits) are among
// them, their scores are not read. `largest` is written.
template <int kBlock, int kMostBlocks>
static inline uint32_t find_skipped(float skip, const RowState& state, const float* scores,
                                    const float* factor, int64_t blocks, uint32_t known,
                                    float& largest) {
  float here[kMostBlocks];
  largest = state.largest;
  for (int64_t block = 0; block < blocks; ++block) {
    if (known >> block & 1) continue;
    here[block] = largest_in_block<kBlock>(scores + block * kBlock, factor[block]);
    if (!(here[block] <= largest)) largest = here[block];
  }
  uint32_t skipped = known;
  for (int64_t block = 0; block < blocks; ++block) {
    if (known >> block & 1) continue;
    // A rounded difference is as good as an exact one: no float lies between the two.
    if (!(here[block] < largest - skip)) continue;
    Ints nan = {};
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      const Floats score = load(scores + block * kBlock + lane);
      nan |= score != score;
    }
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= nan[lane];
    if (!any) skipped |= 1u << block;
  }
  return skipped;
}
