// K and V of a call, packed: each head in the forms in which its query heads multiply it.
//
// Needs, from the generated source: Number, kHeadDim, kValueDim, kGroup and kMixedPrecision.

#pragma once

#include <atomic>

#include "memory.h"
#include "screen.h"

// Whether products of this library are of floats, and whether they are of pairs of bfloat16.
#if defined(__AVX512BF16__)
constexpr bool kOfFloats = !std::is_same_v<Number, Bfloat16>;
constexpr bool kOfPairs = !kOfFloats || kMixedPrecision;
#else
constexpr bool kOfFloats = true, kOfPairs = false;
#endif

// Of a head, the products whose operands are bfloat16 (bits of Mode).
static inline int32_t mode_of(const Call& call, int64_t batch, int64_t head) {
  if (!kOfFloats) return kScoresInBfloat16 | kValuesInBfloat16;
  if (!kOfPairs || !call.modes) return 0;
  return call.modes[batch * call.mode_batch_stride + head * call.mode_head_stride];
}

// How far below its row's maximum a score of a head is to be left out.
static inline float skip_of(const Call& call, int64_t batch, int64_t head) {
  if (!call.skip) return kInfinity;
  return call.skip[batch * call.skip_batch_stride + head * call.skip_head_stride];
}

// K or V of some of the key heads, in one of its forms.
template <typename Word, int kBlockWords>
struct Panels {
  int64_t blocks;
  Buffer<int64_t> places;  // of each [batch, key head]: which of those in `words` it is, or -1
  Buffer<Word> words;

  // wanted: whether a key head is to be there, by batch and head. False where there is no memory.
  template <typename Wanted>
  bool make(const Call& call, const Wanted& wanted) {
    const int64_t heads = call.heads / kGroup;
    blocks = (call.columns + kBlockKeys - 1) / kBlockKeys;
    places = buffer_of<int64_t>(call.batch * heads);
    if (!places) return false;
    int64_t count = 0;
    for (int64_t i = 0; i < call.batch * heads; ++i)
      places[i] = wanted(i / heads, i % heads) ? count++ : -1;
    words = buffer_of<Word>(count * blocks * kBlockWords);
    return bool(words);
  }

  // A block of the i-th of [batch, key head], null where that is not there.
  Word* find(int64_t i, int64_t block) const {
    return places[i] < 0 ? nullptr : words.get() + (places[i] * blocks + block) * kBlockWords;
  }
};

// All of K and V, packed; those of a head in each form that some query head of its group wants.
struct PackedKeys {
  template <typename Word>
  using Keys = Panels<Word, words_of<Word>(kHeadDim) * kBlockKeys>;
  template <typename Word>
  using Values = Panels<Word, kBlockKeys / kInWord<Word> * rounded_up(kValueDim, kLanes)>;

  int64_t heads, blocks;
  Panels<uint32_t, kScreenBlockWords> screens;  // of key heads of which a query head skips
  Keys<float> keys;
  Keys<uint32_t> key_pairs;
  Values<float> values;
  Values<uint32_t> value_pairs;

  // False where there is no memory.
  bool make(const Call& call) {
    heads = call.heads / kGroup, blocks = (call.columns + kBlockKeys - 1) / kBlockKeys;
    // Whether some head of a group has a bit of its mode like this.
    const auto some = [&call](int32_t bit, bool set) {
      return [&call, bit, set](int64_t batch, int64_t head) {
        for (int64_t i = head * kGroup; i < (head + 1) * kGroup; ++i)
          if (bool(mode_of(call, batch, i) & bit) == set) return true;
        return false;
      };
    };
    const auto skips = [&call](int64_t batch, int64_t head) {
      bool any = false;
      for (int64_t i = head * kGroup; i < (head + 1) * kGroup; ++i)
        any |= skip_of(call, batch, i) < kInfinity;
      return kCanScreen && any;
    };
    return screens.make(call, skips) && keys.make(call, some(kScoresInBfloat16, false)) &&
           key_pairs.make(call, some(kScoresInBfloat16, true)) &&
           values.make(call, some(kValuesInBfloat16, false)) &&
           value_pairs.make(call, some(kValuesInBfloat16, true));
  }

  template <typename Word>
  const Word* keys_of(int64_t batch, int64_t head, int64_t block) const {
    if constexpr (std::is_same_v<Word, float>) return keys.find(batch * heads + head, block);
    else return key_pairs.find(batch * heads + head, block);
  }
  template <typename Word>
  const Word* values_of(int64_t batch, int64_t head, int64_t block) const {
    if constexpr (std::is_same_v<Word, float>) return values.find(batch * heads + head, block);
    else return value_pairs.find(batch * heads + head, block);
  }

  const uint32_t* screen_of(int64_t batch, int64_t head, int64_t block) const {
    return screens.find(batch * heads + head, block);
  }

  // Whether all elements are finite.
  bool fill(const Call& call) {
    std::atomic<bool> finite{true};
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t item = 0; item < call.batch * heads * blocks; ++item) {
      const auto [batch, head, block] = place_of(item, heads, blocks);
      const int64_t first = block * kBlockKeys;
      const int64_t rest = call.columns - first, count = rest < kBlockKeys ? rest : kBlockKeys;
      const Number* from_k = row_of(call.k, batch, head, first);
      const Number* from_v = row_of(call.v, batch, head, first);
      bool good = true;
      const auto pack = [&](auto* to_k, auto* to_v) {
        if (to_k) good &= pack_keys<kHeadDim>(from_k, call.k.row_stride, count, to_k);
        if (to_v) good &= pack_values<kValueDim>(from_v, call.v.row_stride, count, to_v);
      };
      const int64_t i = batch * heads + head;
      if constexpr (kOfFloats) pack(keys.find(i, block), values.find(i, block));
      if constexpr (kOfPairs) pack(key_pairs.find(i, block), value_pairs.find(i, block));
      if (uint32_t* words = screens.find(i, block)) {
        const Forms forms = {keys.find(i, block) != nullptr, key_pairs.find(i, block) != nullptr};
        screen_keys(from_k, call.k.row_stride, count, forms, words);
      }
      if (!good) finite.store(false, std::memory_order_relaxed);
    }
    return finite.load();
  }
};
