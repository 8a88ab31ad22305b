// Q, K and V as the micro-kernel wants them. Whoever copies also looks whether all is finite.

#pragma once

#include <type_traits>

#include "matrices.h"
#include "numbers.h"

// Keys of one block of the lists, and of the packed K and V.
constexpr int kBlockKeys = 64;
static_assert(kBlockKeys % kPanel == 0, "a block of keys is a whole number of panels");

// How many elements of depth are in a word: one float, or two bfloat16.
template <typename Word>
constexpr int kInWord = std::is_same_v<Word, float> ? 1 : 2;

template <typename Word>
constexpr int words_of(int depth) {
  return (depth + kInWord<Word> - 1) / kInWord<Word>;
}

constexpr int rounded_up(int size, int step) { return (size + step - 1) / step * step; }

// Two neighbours in depth as one word.
static inline uint32_t pair_of(float low, float high) {
  return uint32_t(from_float<Bfloat16>(low).bits) | uint32_t(from_float<Bfloat16>(high).bits) << 16;
}

// kLanes words from `word` of a row of kDim elements, what is beyond it 0.
template <int kDim, typename Word, typename Number>
static inline auto load_words(const Number* row, int word) {
  if constexpr (std::is_same_v<Word, float>) {
    return load_some<kDim>(row, word);
  } else {
    static_assert(std::is_same_v<Number, Bfloat16>, "two bfloat16 are a word as they lie");
    const int left = kDim - 2 * word;
    Words words = {};
    std::memcpy(&words, row + 2 * word, left < 2 * kLanes ? 2 * left : sizeof words);
    return words;
  }
}

// Whether a row is finite, and stays so in words of that kind: the largest floats round to an infinite
// bfloat16.
template <int kDim, typename Word = float, typename Number>
static inline bool is_finite(const Number* row) {
  constexpr bool kRounds = !std::is_same_v<Word, float> && !std::is_same_v<Number, Bfloat16>;
  constexpr uint32_t kBeyond = kRounds ? 0x7f7f8000u : 0x7f800000u;
  uint32_t bad = 0;
  for (int d = 0; d < kDim; ++d)
    bad |= (bits_of(to_float(row[d])) & 0x7fffffffu) >= kBeyond ? 1u : 0u;
  return bad == 0;
}

// One row, its elements along the depth.
template <int kDim, typename Word, typename Number>
static inline void pack_row(const Number* row, Word* packed) {
  if constexpr (std::is_same_v<Word, float>) {
    for (int d = 0; d < kDim; ++d) packed[d] = to_float(row[d]);
  } else if constexpr (std::is_same_v<Number, Bfloat16> && kDim % 2 == 0) {
    std::memcpy(packed, row, kDim * sizeof(Number));
  } else if constexpr (kDim % kLanes == 0) {
    for (int d = 0; d < kDim; d += kLanes)
      store_rounded(reinterpret_cast<Bfloat16*>(packed) + d, load_floats(row + d));
  } else {
    for (int d = 0; d + 1 < kDim; d += 2)
      packed[d / 2] = pair_of(to_float(row[d]), to_float(row[d + 1]));
    if constexpr (kDim % 2 != 0) packed[kDim / 2] = pair_of(to_float(row[kDim - 1]), 0.0f);
  }
}

// Lane j of vector i and lane i of vector j change places: each round zips vectors half of them apart.
template <int kRound = 1>
static inline void transpose(Floats* square) {
  if constexpr (kRound < kLanes) {
    Floats zipped_ones[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      const Floats a = square[i], b = square[i + kLanes / 2];
      zipped_ones[2 * i] = zipped<0>(a, b, Lanes());
      zipped_ones[2 * i + 1] = zipped<kLanes / 2>(a, b, Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = zipped_ones[i];
    transpose<2 * kRound>(square);
  }
}

// Rows lie as far apart as all heads of a position reach, so that the machine does not see which comes
// next: one is fetched so many rows ahead. Always inline: GCC drops calls of what only prefetches.
constexpr int kRowsAhead = 16;

template <int kDim, typename Number>
static inline __attribute__((always_inline)) void fetch(const Number* row) {
#pragma GCC unroll 16
  for (int d = 0; d < kDim; d += int(64 / sizeof(Number))) __builtin_prefetch(row + d, 0, 3);
}

// A block of keys transposed: panels of [words, kPanel], keys beyond `keys` zero. Whether all is
// finite.
template <int kDim, typename Word, typename Number>
static bool pack_keys(const Number* from, int64_t row_stride, int64_t keys, Word* packed) {
  constexpr int kWords = words_of<Word>(kDim);
  bool finite = true;
  alignas(64) Word rows[kLanes][rounded_up(kWords, kLanes)];
  for (int first = 0; first < kBlockKeys; first += kLanes) {
    Word* out = packed + first / kPanel * kPanel * kWords + first % kPanel;
    for (int row = 0; row < kLanes; ++row) {
      if (first + row < keys) {
        const Number* key = from + (first + row) * row_stride;
        fetch<kDim>(key + kRowsAhead * row_stride);
        finite &= is_finite<kDim, Word>(key);
        pack_row<kDim>(key, rows[row]);
      } else {
        std::memset(rows[row], 0, sizeof rows[row]);
      }
    }
    for (int word = 0; word < kWords; word += kLanes) {
      Floats square[kLanes];
      for (int row = 0; row < kLanes; ++row) square[row] = (Floats)load(rows[row] + word);
      transpose(square);
      for (int i = 0; i < kLanes && word + i < kWords; ++i)
        store(reinterpret_cast<float*>(out) + (word + i) * kPanel, square[i]);
    }
  }
  return finite;
}

// A block of values: panels of [keys (or pairs of keys), kPanel], the last as wide as what is left.
template <int kDim, typename Word, typename Number>
static bool pack_values(const Number* from, int64_t row_stride, int64_t keys, Word* packed) {
  constexpr int kPadded = rounded_up(kDim, kLanes);
  constexpr int kDepth = kBlockKeys / kInWord<Word>;
  bool finite = true;
  float rows[kInWord<Word>][kPadded];
  std::memset(rows, 0, sizeof rows);
  for (int step = 0; step < kDepth; ++step) {
    for (int part = 0; part < kInWord<Word>; ++part) {
      const int64_t key = step * kInWord<Word> + part;
      const Number* row = from + key * row_stride;
      if (key < keys) fetch<kDim>(row + kRowsAhead * row_stride), finite &= is_finite<kDim, Word>(row);
      for (int d = 0; d < kDim; ++d) rows[part][d] = key < keys ? to_float(row[d]) : 0.0f;
    }
    for (int column = 0; column < kPadded; column += kPanel) {
      const int width = kPadded - column < kPanel ? kPadded - column : kPanel;
      Word* out = packed + column * kDepth + step * width;
      for (int lane = 0; lane < width; lane += kLanes) {
        if constexpr (std::is_same_v<Word, float>)
          store(out + lane, load(rows[0] + column + lane));
        else
          store_pairs(out + lane, load(rows[0] + column + lane), load(rows[1] + column + lane));
      }
    }
  }
  return finite;
}
