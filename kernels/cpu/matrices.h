// C (+)= A B for a block of keys: the two products of attention, from packed panels.
//
// A is [rows, depth], or transposed as it lies, [depth, rows]: one element of it at a time goes to all
// lanes, so either will do. B is packed: panels of kPanel columns, each [depth, kPanel]. A word is 32
// bits of depth: one float, or two bfloat16 that one instruction multiplies and adds in pairs.

#pragma once

#include "numbers.h"

#if defined(__AVX512F__)
// 6 x 4 sums, 4 columns of B and one element of A: 29 of 32 registers.
constexpr int kTileRows = 6, kPanelVectors = 4;
#elif defined(__AVX2__)
// 6 x 2 sums, 2 columns of B and one element of A: 15 of 16 registers.
constexpr int kTileRows = 6, kPanelVectors = 2;
#else
constexpr int kTileRows = 6, kPanelVectors = 4;
#endif
constexpr int kPanel = kPanelVectors * kLanes;

// sum + a * b, a in every lane.
static inline Floats multiply_add(Floats sum, float a, const float* b) { return sum + a * load(b); }

#if defined(__AVX512BF16__)
// Both halves of each word.
static inline Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a),
                                  (__m512bh)_mm512_loadu_si512(b));
}
#endif

// One tile of sums, held in registers over the whole depth. What is there already is added last:
// short sums of short sums round less than one long sum.
template <int kRows, int kVectors, bool kTransposed, typename Word>
static inline void multiply_tile(const Word* a, int64_t a_stride, const Word* b, float* c,
                                 int64_t c_stride, int64_t depth, bool accumulate) {
  Floats sum[kRows][kVectors] = {};
  for (int64_t step = 0; step < depth; ++step) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector)
        sum[row][vector] = multiply_add(
            sum[row][vector], kTransposed ? a[step * a_stride + row] : a[row * a_stride + step],
            b + step * kVectors * kLanes + vector * kLanes);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      float* to = c + row * c_stride + vector * kLanes;
      store(to, accumulate ? load(to) + sum[row][vector] : sum[row][vector]);
    }
}

// All rows against one panel of kVectors vectors.
template <int kVectors, bool kTransposed, typename Word>
static void multiply_panel(int64_t rows, const Word* a, int64_t a_stride, const Word* b, float* c,
                           int64_t c_stride, int64_t depth, bool accumulate) {
  const int64_t next_row = kTransposed ? 1 : a_stride;
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows)
    multiply_tile<kTileRows, kVectors, kTransposed>(a + row * next_row, a_stride, b,
                                                    c + row * c_stride, c_stride, depth, accumulate);
  const Word* rest = a + row * next_row;
  float* out = c + row * c_stride;
#define REST(kRows)                                                                             \
  case kRows:                                                                                   \
    return multiply_tile<kRows, kVectors, kTransposed>(rest, a_stride, b, out, c_stride, depth, \
                                                       accumulate);
  switch (rows - row) { REST(5) REST(4) REST(3) REST(2) REST(1) }
#undef REST
}

// C [rows, kColumns] (+)= A [rows, depth] B, kColumns a multiple of the lanes.
template <int kColumns, bool kTransposed = false, typename Word>
static void multiply(int64_t rows, const Word* a, int64_t a_stride, const Word* b, float* c,
                     int64_t c_stride, int64_t depth, bool accumulate) {
  constexpr int kWhole = kColumns / kPanel * kPanel, kRest = kColumns - kWhole;
  for (int column = 0; column < kWhole; column += kPanel)
    multiply_panel<kPanelVectors, kTransposed>(rows, a, a_stride, b + column * depth, c + column,
                                               c_stride, depth, accumulate);
  if constexpr (kRest > 0)
    multiply_panel<kRest / kLanes, kTransposed>(rows, a, a_stride, b + kWhole * depth, c + kWhole,
                                                c_stride, depth, accumulate);
}
