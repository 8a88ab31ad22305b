// What a guard looks at before an attention is computed as a policy decided: statistics of at most
// kGuardRows rows of Q, K and V, evenly spaced, against the ranges they were calibrated in.
//
// Needs what forward.h needs. kernels/envelope.py has the same statistics by torch's functions.

#pragma once

#include "forward.h"

constexpr int64_t kGuardRows = 64;
// They lie far apart: each is fetched so many before it is read.
constexpr int64_t kGuardRowsAhead = 8;
// Heads from which on threads are worth waking.
constexpr int64_t kGuardedAlone = 16;
// Root mean square; largest magnitude; the share of the mean square that is the mean row's.
constexpr int kMeasures = 3;

// Of one head of a tensor.
template <int kDim>
static void measure(const Tensor& tensor, int64_t batch, int64_t head, int64_t rows, float* found) {
  constexpr int kWide = rounded_up(kDim, kLanes);
  const int64_t step = (rows + kGuardRows - 1) / kGuardRows;
  Floats sums[kWide / kLanes] = {}, squares = {}, largest = {};
  int64_t count = 0;
  for (int64_t row = 0; row < rows; row += step, ++count) {
    const Number* from = row_of(tensor, batch, head, row);
    fetch<kDim>(from + kGuardRowsAhead * step * tensor.row_stride);
    for (int d = 0; d < kWide; d += kLanes) {
      const Floats x = load_some<kDim>(from, d);
      sums[d / kLanes] += x;
      squares += x * x;
      largest = larger(x < 0.0f ? -x : x, largest);
    }
  }
  Floats of_mean = {};
  for (const Floats& sum : sums) of_mean += sum * sum;
  const float mean_square = sum_of(squares) / float(count * kDim);
  found[0] = root_of(mean_square);
  found[1] = largest_of(largest);
  const float least = mean_square > 1e-30f ? mean_square : 1e-30f;
  found[2] = sum_of(of_mean) / (float(count) * float(count) * kDim) / least;
}

// All members of 64 bits; kernels/cpu/call.py fills it.
struct GuardCall {
  Tensor q, k, v;
  int64_t batch, heads, rows, columns, threads;
  const float *low, *high;  // [9, H], of Q, K and V in turn
  const double* state;      // [H, state_stride], of which `demoted` is one column
  int64_t state_stride, demoted;
  int32_t* flags;  // [B, H]
};

static_assert(sizeof(GuardCall) == 23 * 8, "all members are of 64 bits");

constexpr int32_t kDemotedFlag = -2;

// flags: 1 where all nine statistics, those of the key head too, are in their ranges, else 0; NaN is
// in none. Another one where the head is demoted.
static void guard(const GuardCall& call) {
  const int64_t kv_heads = call.heads / kGroup;
  const int64_t threads = call.batch * call.heads < kGuardedAlone ? 1 : call.threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < call.batch * kv_heads; ++item) {
    const int64_t batch = item / kv_heads, kv_head = item % kv_heads;
    float found[3][kMeasures];
    measure<kHeadDim>(call.k, batch, kv_head, call.columns, found[1]);
    measure<kValueDim>(call.v, batch, kv_head, call.columns, found[2]);
    for (int64_t head = kv_head * kGroup; head < (kv_head + 1) * kGroup; ++head) {
      int32_t& flag = call.flags[batch * call.heads + head];
      flag = kDemotedFlag;
      if (call.state[head * call.state_stride + call.demoted] > 0) continue;
      measure<kHeadDim>(call.q, batch, head, call.rows, found[0]);
      bool inside = true;
      for (int64_t i = 0; i < 3 * kMeasures; ++i) {
        const float value = found[i / kMeasures][i % kMeasures];
        const int64_t at = i * call.heads + head;
        inside &= value >= call.low[at] && value <= call.high[at];
      }
      flag = inside;
    }
  }
}
