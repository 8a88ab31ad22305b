// Which weights dropout keeps: a function of the seed and the place, the same forward and backward.

#pragma once

#include "vectors.h"

// One number for a row, by the finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable
// pseudorandom number generators", 2014).
static inline uint32_t row_of_numbers(uint64_t seed, uint64_t row) {
  uint64_t z = seed + 0x9e3779b97f4a7c15u * (row + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return uint32_t(z ^ (z >> 31)) ^ uint32_t(z >> 32);
}

// For keys from `first`: 0, or 1 / (1 - p). The mix is that of 32-bit MurmurHash3's end.
static inline void dropout_row(uint32_t numbers, int64_t first, int64_t keys, float p,
                               float* factor) {
  const uint32_t threshold = uint32_t(double(p) * 4294967296.0);
  const float kept = 1.0f / (1.0f - p);
#pragma GCC ivdep
  for (int64_t i = 0; i < keys; ++i) {
    uint32_t z = numbers + uint32_t(first + i) * 0x9e3779b9u;
    z = (z ^ (z >> 16)) * 0x85ebca6bu;
    z = (z ^ (z >> 13)) * 0xc2b2ae35u;
    z ^= z >> 16;
    factor[i] = z < threshold ? 0.0f : kept;
  }
}
