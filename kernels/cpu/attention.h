// The forward pass, in the way and the precision that a call wants: blocks of query rows of all heads in
// parallel, or few rows with their keys split.

#pragma once

#include "decode.h"

// Memory for a block of query rows of any head: the next may be of another precision.
union AnyQueryBlock {
  QueryBlock<float, float> floats;
  QueryBlock<uint32_t, float> score_pairs;
  QueryBlock<float, uint32_t> value_pairs;
  QueryBlock<uint32_t, uint32_t> pairs;

  bool run(const Call& call, const PackedKeys& packed, int64_t batch, int64_t head,
           int64_t block) {
    switch (mode_of(call, batch, head)) {
      case 0:
        if constexpr (kOfFloats) return floats.run(call, packed, batch, head, block);
        break;
      case kScoresInBfloat16:
        if constexpr (kOfFloats && kOfPairs)
          return score_pairs.run(call, packed, batch, head, block);
        break;
      case kValuesInBfloat16:
        if constexpr (kOfFloats && kOfPairs)
          return value_pairs.run(call, packed, batch, head, block);
        break;
      default:
        if constexpr (kOfPairs) return pairs.run(call, packed, batch, head, block);
    }
    __builtin_unreachable();
  }
};

static Status forward(const Call& call) {
  PackedKeys packed;
  if (!packed.make(call)) return kNoMemory;
  if (!packed.fill(call)) return kNotFinite;
  const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows;
  const int64_t items = call.batch * call.heads * blocks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> status{kDone};
#pragma omp parallel num_threads(call.threads)
  {
    auto memory = buffer_of<AnyQueryBlock>(1);
    if (!memory) status.store(kNoMemory);
    // Last rows first: under a causal mask they take longest.
    for (int64_t item; memory && (item = next++) < items;) {
      const auto [batch, head, from_last] = place_of(item, call.heads, blocks);
      if (status.load() != kDone) break;
      if (!memory[0].run(call, packed, batch, head, blocks - 1 - from_last))
        status.store(kNotFinite);
    }
  }
  return Status(status.load());
}

// In floats, or in bfloat16 where the machine has it and the tensors are, or the plan asks for it.
static Status attention(const Call& call) {
  // Not where a backward pass follows: it computes the same products in the same order.
  const bool few = call.places || (call.rows <= kFewRows && !call.statistics);
  if (!few) return forward(call);
  // Whatever the plan says of precision and of skipping: to be exact is always allowed, and what takes
  // the time here is reading keys and values.
  if constexpr (kOfFloats) return decode<float>(call);
  else return decode<uint32_t>(call);
}
