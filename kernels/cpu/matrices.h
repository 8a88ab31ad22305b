// C (+)= A B for a block of keys: the two products of attention, from packed panels.
//
// A is [rows, depth], or transposed as it lies, [depth, rows]: one element of it at a time goes to
// all lanes, so either will do. B is packed: panels of kPanel columns, each [depth, kPanel]. A word is 32
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
// For the 32 registers of NEON; elsewhere some sums spill.
constexpr int kTileRows = 6, kPanelVectors = 4;
#endif
static_assert(kTileRows == 6 && (kPanelVectors == 2 || kPanelVectors == 4), "the switches below");
constexpr int kPanel = kPanelVectors * kLanes;

// sum + a * b.
static inline Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }

#if defined(__AVX512BF16__)
// Both halves of each word.
static inline Floats multiply_add(Floats sum, Words a, Words b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

// Of each strip of kTileRows rows: the part, [from, to), of the columns of C or of the depth that is
// anything but zero.
struct Range {
  int from, to;
};

// One tile of sums, held in registers over the whole depth; kStride words of B from step to step.
// What is there already is added last: short sums of short sums round less than one long sum.
template <int kRows, int kVectors, int kStride, bool kTransposed, typename Word>
static inline void multiply_tile(const Word* a, int64_t a_stride, const Word* b, float* c,
                                 int64_t c_stride, int64_t depth, bool accumulate) {
  Floats sum[kRows][kVectors] = {};
  for (int64_t step = 0; step < depth; ++step) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectors; ++vector)
        sum[row][vector] = multiply_add(
            sum[row][vector], all(kTransposed ? a[step * a_stride + row] : a[row * a_stride + step]),
            load(b + step * kStride + vector * kLanes));
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      float* to = c + row * c_stride + vector * kLanes;
      store(to, accumulate ? load(to) + sum[row][vector] : sum[row][vector]);
    }
}

// Fewer than kTileRows rows.
template <int kVectors, bool kTransposed, typename Word>
static void multiply_rest(int64_t rows, const Word* a, int64_t a_stride, const Word* b, float* c,
                          int64_t c_stride, int64_t depth, bool accumulate) {
#define REST(kRows)                                                                   \
  case kRows:                                                                         \
    return multiply_tile<kRows, kVectors, kVectors * kLanes, kTransposed>(            \
        a, a_stride, b, c, c_stride, depth, accumulate);
  switch (rows) { REST(5) REST(4) REST(3) REST(2) REST(1) }
#undef REST
}

// Only the vectors [from, to) of one whole panel, for one tile.
template <typename Word>
static inline void multiply_vectors(int from, int to, const Word* a, int64_t a_stride, const Word* b,
                                    float* c, int64_t c_stride, int64_t depth) {
  b += from * kLanes, c += from * kLanes;
#define VECTORS(kVectors)                                                                         \
  case kVectors:                                                                                  \
    return multiply_tile<kTileRows, kVectors, kPanel, false>(a, a_stride, b, c, c_stride, depth, \
                                                             false);
  switch (to - from) {
    VECTORS(1)
    VECTORS(2)
#if defined(__AVX512F__) || !defined(__AVX2__)
    VECTORS(3)
    VECTORS(4)
#endif
  }
#undef VECTORS
}

// C [rows, kColumns] = A [rows, depth] B of whole panels, but for columns outside a strip's part.
template <int kColumns, typename Word>
static void multiply_columns(int64_t rows, const Word* a, int64_t a_stride, const Word* b, float* c,
                             int64_t c_stride, int64_t depth, const Range* parts) {
  static_assert(kColumns % kPanel == 0, "whole panels");
  for (int column = 0; column < kColumns; column += kPanel, b += kPanel * depth)
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Range part = parts[row / kTileRows];
      const int from = part.from > column ? (part.from - column) / kLanes : 0;
      const int end = part.to - column < kPanel ? part.to - column : kPanel;
      const int to = (end + kLanes - 1) / kLanes;
      if (to <= from) continue;
      const Word* left = a + row * a_stride;
      float* out = c + row * c_stride + column;
      if (row + kTileRows <= rows)
        multiply_vectors(from, to, left, a_stride, b, out, c_stride, depth);
      else
        multiply_rest<kPanelVectors, false>(rows - row, left, a_stride, b, out, c_stride, depth,
                                            false);
    }
}

// All rows against one panel of kVectors vectors; of the depth only `parts`, where they are given.
template <int kVectors, bool kTransposed, typename Word>
static void multiply_panel(int64_t rows, const Word* a, int64_t a_stride, const Word* b, float* c,
                           int64_t c_stride, int64_t depth, bool accumulate, const Range* parts) {
  const int64_t next_row = kTransposed ? 1 : a_stride, next_step = kTransposed ? a_stride : 1;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const Range part = parts ? parts[row / kTileRows] : Range{0, int(depth)};
    const Word* left = a + row * next_row + part.from * next_step;
    const Word* right = b + part.from * kVectors * kLanes;
    float* out = c + row * c_stride;
    if (row + kTileRows <= rows)
      multiply_tile<kTileRows, kVectors, kVectors * kLanes, kTransposed>(
          left, a_stride, right, out, c_stride, part.to - part.from, accumulate);
    else
      multiply_rest<kVectors, kTransposed>(rows - row, left, a_stride, right, out, c_stride,
                                           part.to - part.from, accumulate);
  }
}

// C [rows, kColumns] (+)= A [rows, depth] B, kColumns a multiple of the lanes.
template <int kColumns, bool kTransposed = false, typename Word>
static void multiply(int64_t rows, const Word* a, int64_t a_stride, const Word* b, float* c,
                     int64_t c_stride, int64_t depth, bool accumulate,
                     const Range* parts = nullptr) {
  constexpr int kWhole = kColumns / kPanel * kPanel, kRest = kColumns - kWhole;
  for (int column = 0; column < kWhole; column += kPanel)
    multiply_panel<kPanelVectors, kTransposed>(rows, a, a_stride, b + column * depth, c + column,
                                               c_stride, depth, accumulate, parts);
  if constexpr (kRest > 0)
    multiply_panel<kRest / kLanes, kTransposed>(rows, a, a_stride, b + kWhole * depth, c + kWhole,
                                                c_stride, depth, accumulate, parts);
}
