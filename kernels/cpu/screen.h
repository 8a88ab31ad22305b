// Whether a block of keys can hold a score that a strip of rows does not skip, told from products of
// numbers of 8 bits, at half of what bfloat16 costs: where not, its scores are never computed.
//
// A row q is s_q a + d_q, with whole numbers a of -127 to 127 and what rounding left, d_q; a key k
// is s_k b + d_k. By Cauchy and Schwarz
//
//     |q k - s_q s_k a b|  =  |d_q (s_k b) + q d_k|  <=  |d_q| |s_k b| + |q| |d_k|
//
// so that a score is surely below a limit where a b is below the limit less this, in units of s_q s_k.
// q and k are the numbers that scores are computed of (in bfloat16, where they are). What is screened
// out is what `find_skipped` would leave out, so that results are the same, bit by bit, without it.
//
// Needs, from the generated source: kHeadDim, kScale and kPlain.

#pragma once

#include "matrices.h"
#include "pack.h"

#if defined(__AVX512VNNI__)
constexpr bool kCanScreen = kPlain;
#else
constexpr bool kCanScreen = false;
#endif

// Words of four whole numbers of 8 bits of a row or key.
constexpr int kBytesInWord = 4, kScreenWords = (kHeadDim + kBytesInWord - 1) / kBytesInWord;
constexpr int kScreenRounded = rounded_up(kHeadDim, kLanes);
// The root of the dimension, or more.
constexpr float kRootOfDim = kHeadDim <= 64 ? 8.0f : kHeadDim <= 256 ? 16.0f : float(kHeadDim);
// What is behind the numbers of a block of keys.
struct ScreenedBlock {
  float step;   // s_k
  float error;  // the largest |d_k|
  float norm;   // the largest |s_k b|
};
constexpr int kScreenBlockWords = kScreenWords * kBlockKeys + kLanes;
static_assert(sizeof(ScreenedBlock) <= sizeof(Words), "it is kept behind the words");

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// One row in whole numbers b, and steps s of them: the largest |x - s b|, |x| and |s b|.
struct Screened {
  float error, norm, whole;
};

// In which forms rows are multiplied: as floats, rounded to bfloat16, or both.
struct Forms {
  bool floats, pairs;
};

static inline Floats in_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (Floats)(__builtin_convertvector(rounded_halves(x), Words) << 16);
#else
  return x;
#endif
}

template <int kDim, typename Number>
static inline float largest_magnitude(const Number* row) {
  Floats most = {};
  for (int d = 0; d < kDim; d += kLanes) {
    const Floats x = load_some<kDim>(row, d);
    most = larger(x < 0.0f ? -x : x, most);
  }
  return largest_of(most);
}

// x / step to the nearest whole number, as bytes; error and norm hold in each of the forms. Squares
// are of multiples of the step: those of small numbers by themselves would be 0.
template <typename Number>
static inline Screened screen_row(const Number* row, float step, Forms forms, int8_t* bytes) {
  const Floats rounding = all(12582912.0f);  // 1.5 * 2^23: the sum has no bits behind the point
  const float inverse = 1.0f / step;
  Floats errors[2] = {}, squares[2] = {}, wholes = {};
  for (int d = 0; d < kScreenRounded; d += kLanes) {
    const Floats x = load_some<kHeadDim>(row, d);
    const Floats given[2] = {rounded(x * inverse), rounded(in_bfloat16(x) * inverse)};
    Floats n = given[0] + rounding - rounding;
    n = n > 127.0f ? all(127.0f) : n;
    n = n < -127.0f ? all(-127.0f) : n;
    wholes += n * n;
    for (int form = 0; form < 2; ++form) {
      const Floats left = given[form] - n;
      errors[form] += left * left, squares[form] += given[form] * given[form];
    }
    const Bytes packed = __builtin_convertvector(__builtin_convertvector(n, Ints), Bytes);
    std::memcpy(bytes + d, &packed, sizeof packed);
  }
  Screened found = {0, 0, root_of(sum_of(wholes)) * step};
  for (int form = 0; form < 2; ++form) {
    if (!(form == 0 ? forms.floats : forms.pairs)) continue;
    // The last for what rounding did to multiples of up to 127, of each element.
    const float error = root_of(sum_of(errors[form])) + 127.0f * 2.4e-7f * kRootOfDim;
    const float norm = root_of(sum_of(squares[form]));
    found.error = found.error > error * step ? found.error : error * step;
    found.norm = found.norm > norm * step ? found.norm : norm * step;
  }
  return found;
}

static inline float step_for(float largest) { return largest > 1e-30f ? largest / 127.0f : 1e-30f; }

// A block of keys: words of four numbers, 128 added to each, panel by panel as in pack.h; those
// beyond `keys` are 0.
template <typename Number>
static void screen_keys(const Number* from, int64_t row_stride, int64_t keys, Forms forms,
                        uint32_t* words) {
  float largest = 0;
  for (int64_t key = 0; key < keys; ++key) {
    const float here = largest_magnitude<kHeadDim>(from + key * row_stride);
    largest = here > largest ? here : largest;
  }
  ScreenedBlock block = {step_for(largest), 0, 0};
  for (int64_t key = 0; key < kBlockKeys; ++key) {
    alignas(64) int8_t bytes[kScreenRounded] = {};
    if (key < keys) {
      const Screened found = screen_row(from + key * row_stride, block.step, forms, bytes);
      block.error = found.error > block.error ? found.error : block.error;
      block.norm = found.whole > block.norm ? found.whole : block.norm;
    }
    uint32_t* out = words + key / kPanel * kPanel * kScreenWords + key % kPanel;
    for (int word = 0; word < kScreenWords; ++word) {
      uint32_t four;
      std::memcpy(&four, bytes + word * kBytesInWord, sizeof four);
      out[word * kPanel] = four ^ 0x80808080u;  // 128 more
    }
  }
  std::memcpy(words + kScreenWords * kBlockKeys, &block, sizeof block);
}

// Sums of products of bytes: of `keys`, from 0 to 255, and of `query`, from -128 to 127.
static inline Ints add_products(Ints sum, Words keys, Words query) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(query));
#endif
  return sum;
}

static inline bool any_of(Ints mask) {
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= mask[lane];
  return any != 0;
}

// Up to kMostRows query rows in whole numbers.
template <int kMostRows>
struct ScreenedRows {
  static constexpr int kRows = rounded_up(rounded_up(kMostRows, kTileRows), kLanes);

  alignas(64) uint32_t words[kRows * kScreenWords];
  alignas(64) float error[kRows], norm[kRows];
  alignas(64) float inverse[kRows];   // 1 / (s_q scale)
  alignas(64) int32_t added[kRows];   // what 128 more in each number of a key add to a product
  alignas(64) int32_t limits[kRows];  // of the present block: products from here on are not skipped

  template <typename Number>
  void set(int64_t row, const Number* query, Forms forms) {
    alignas(64) int8_t bytes[kScreenRounded];
    const float step = step_for(largest_magnitude<kHeadDim>(query));
    const Screened found = screen_row(query, step, forms, bytes);
    error[row] = found.error, norm[row] = found.norm, inverse[row] = 1.0f / (step * kScale);
    added[row] = 0;
    for (int d = 0; d < kHeadDim; ++d) added[row] += 128 * bytes[d];
    std::memcpy(words + row * kScreenWords, bytes, sizeof(uint32_t) * kScreenWords);
  }

  // Rows that are not there skip everything.
  void clear_from(int64_t row) {
    for (; row < kRows; ++row) {
      std::memset(words + row * kScreenWords, 0, sizeof(uint32_t) * kScreenWords);
      error[row] = norm[row] = inverse[row] = 0, added[row] = 0;
    }
  }

  // below: what a score of each row must be below to be skipped, whatever the block holds.
  void limit(const ScreenedBlock& block, const float* below, int64_t rows) {
    const float inverse_step = 1.0f / block.step;
    // For the sums of floats that scores are, and those here: the error of a term, for each.
    constexpr float kSlack = float(kHeadDim + 16) * 1.2e-7f;
    for (int row = 0; row < kRows; row += kLanes) {
      const Floats q = load(norm + row);
      const Floats margin = load(error + row) * block.norm + q * block.error +
                            q * ((block.norm + block.error) * kSlack);
      Floats limit = (load(below + row) - margin * kScale) * load(inverse + row) * inverse_step;
      limit = limit > -1e8f ? limit : all(-1e8f);  // NaN too: nothing is skipped then
      limit = limit < 1e8f ? limit : all(1e8f);
      // Less what rounding did to a number that is near a product.
      const Ints whole = __builtin_convertvector(limit, Ints) - 4;
      Ints sum;
      std::memcpy(&sum, added + row, sizeof sum);
      sum += whole;
      std::memcpy(limits + row, &sum, sizeof sum);
    }
    for (int64_t row = rows; row < kRows; ++row) limits[row] = std::numeric_limits<int32_t>::max();
  }

  // Whether a row of a strip has a product that reaches its limit.
  bool reaches(int strip, const uint32_t* keys) const {
    const uint32_t* rows = words + strip * kTileRows * kScreenWords;
    Ints reached = {};
    for (int panel = 0; panel < kBlockKeys; panel += kPanel, keys += kPanel * kScreenWords) {
      Ints sums[kTileRows][kPanelVectors] = {};
      for (int step = 0; step < kScreenWords; ++step) {
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
          for (int vector = 0; vector < kPanelVectors; ++vector)
            sums[row][vector] =
                add_products(sums[row][vector], load(keys + step * kPanel + vector * kLanes),
                             all(rows[row * kScreenWords + step]));
      }
#pragma GCC unroll 8
      for (int row = 0; row < kTileRows; ++row) {
        Ints most = sums[row][0];
#pragma GCC unroll 4
        for (int vector = 1; vector < kPanelVectors; ++vector)
          most = sums[row][vector] > most ? sums[row][vector] : most;
        reached |= (Ints)(most >= limits[strip * kTileRows + row]);
      }
    }
    return any_of(reached);
  }
};
