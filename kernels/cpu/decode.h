// Few query rows against many keys: nothing is packed, each key is read once for all rows that share
// it, and a row's keys are split among threads. Each share has its own maximum, sum and output; they
// are joined at the end.
//
// Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
//
// Needs what forward.h needs.

#pragma once

#include "forward.h"

// Up to so many rows of one query head.
constexpr int kFewRows = 8;
// Blocks of keys that a share has at least.
constexpr int64_t kLeastShare = 4;

// What one share leaves of one row.
struct Part {
  float largest, sum;
  float out[rounded_up(kValueDim, kLanes)];
};

// The rows of the query heads that share a key head, and blocks, on one share of the keys.
class FewRows {
 public:
  static constexpr int kRows = kGroup * kFewRows;
  static constexpr int kDim = rounded_up(kHeadDim, kLanes), kOut = rounded_up(kValueDim, kLanes);

  // Whether all queries are finite.
  bool start(const Call& call, int64_t batch, int64_t first_head, int64_t heads) {
    batch_ = batch, first_head_ = first_head, heads_ = heads, rows_ = call.rows;
    bool finite = true;
    std::memset(queries_, 0, sizeof queries_);
    for (int64_t row = 0; row < heads * rows_; ++row) {
      const Number* query = row_of(call.q, batch, head_of(row), row % rows_);
      finite &= is_finite<kHeadDim>(query);
      pack_row<kHeadDim>(query, queries_[row]);
    }
    return finite;
  }

  // Whether all products and outputs are finite.
  bool visit(const Call& call, const int32_t* entries, int64_t count, Part* parts) {
    const int64_t rows = heads_ * rows_;
    for (int64_t row = 0; row < rows; ++row) {
      state_[row] = RowState{};
      std::memset(parts[row].out, 0, sizeof parts[row].out);
    }
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = entries[i] >> 1, first = block * kBlockKeys;
      const int64_t rest = call.columns - first, keys = rest < kBlockKeys ? rest : kBlockKeys;
      for (int64_t row = 0; row < rows; row += kTogether)
        multiply_keys(call, first, keys, row, rows - row < kTogether ? rows - row : kTogether);
      finite &= weigh(call, block, entries[i] & 1, keys, parts);
      for (int64_t row = 0; row < rows; row += kTogether)
        add_values(call, first, keys, row, rows - row < kTogether ? rows - row : kTogether, parts);
    }
    for (int64_t row = 0; row < rows; ++row) {
      parts[row].largest = state_[row].largest;
      parts[row].sum = sum_of(state_[row].sum);
      finite &= is_finite<kOut>(parts[row].out);
    }
    return finite;
  }

 private:
  // Rows that are computed together, in registers.
  static constexpr int kTogether = kGroup % 4 == 0 ? 4 : kGroup % 2 == 0 ? 2 : 1;

  int64_t head_of(int64_t row) const { return first_head_ + row / rows_; }

  // Products of some rows and a block of keys: kLanes keys at a time, each by vectors over its
  // elements, whose lanes are summed for all of them at once.
  void multiply_keys(const Call& call, int64_t first, int64_t keys, int64_t row, int64_t rows) {
    for (int64_t key = 0; key < keys; key += kLanes) {
      Floats sums[kTogether][kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t at = key + lane < keys ? key + lane : keys - 1;
        const Number* elements = row_of(call.k, batch_, first_head_ / kGroup, first + at);
        for (int i = 0; i < kTogether; ++i) sums[i][lane] = Floats{};
        for (int d = 0; d < kHeadDim; d += kLanes) {
          const Floats element = load_some<kHeadDim>(elements, d);
          for (int i = 0; i < kTogether; ++i)
            sums[i][lane] += element * load(queries_[row + (i < rows ? i : 0)] + d);
        }
      }
      for (int i = 0; i < rows; ++i) store(scores_[row + i] + key, sums_of(sums[i]));
    }
  }

  bool weigh(const Call& call, int64_t block, bool masked, int64_t keys, Part* parts) {
    bool finite = true;
    for (int64_t row = 0; row < heads_ * rows_; ++row) {
      uint32_t bad = 0;
      for (int64_t key = 0; key < keys; ++key)
        bad |= (bits_of(scores_[row][key]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
      finite &= bad == 0;
      const float factor = finish_block(call, batch_, head_of(row), row % rows_, 1, block, masked,
                                        scores_[row], kBlockKeys);
      alignas(64) float kept[kBlockKeys];
      if constexpr (kDropout > 0.0f) {
        const int64_t place = (batch_ * call.heads + head_of(row)) * call.rows + row % rows_;
        dropout_row(row_of_numbers(call.seed, place), block * kBlockKeys, kBlockKeys, kDropout,
                    kept);
      }
      const float scale = weigh_row<kBlockKeys>(state_[row], scores_[row], &factor, 1,
                                                kDropout > 0.0f ? kept : nullptr, scores_[row]);
      if (scale != 1.0f)
        for (int e = 0; e < kOut; e += kLanes)
          store(parts[row].out + e, load(parts[row].out + e) * scale);
    }
    return finite;
  }

  // Weights times values, summed over a block of keys.
  void add_values(const Call& call, int64_t first, int64_t keys, int64_t row, int64_t rows,
                  Part* parts) {
    constexpr int kWide = kOut < 4 * kLanes ? kOut : 4 * kLanes;
    for (int e = 0; e < kOut; e += kWide) {
      Floats sums[kTogether][kWide / kLanes] = {};
      for (int64_t key = 0; key < keys; ++key) {
        const Number* elements = row_of(call.v, batch_, first_head_ / kGroup, first + key);
        for (int vector = 0; vector < kWide / kLanes; ++vector) {
          if (e + vector * kLanes >= kValueDim) break;
          const Floats element = load_some<kValueDim>(elements, e + vector * kLanes);
          for (int i = 0; i < kTogether; ++i)
            sums[i][vector] += scores_[row + (i < rows ? i : 0)][key] * element;
        }
      }
      for (int i = 0; i < rows; ++i)
        for (int vector = 0; vector < kWide / kLanes && e + vector * kLanes < kOut; ++vector) {
          float* to = parts[row + i].out + e + vector * kLanes;
          store(to, load(to) + sums[i][vector]);
        }
    }
  }

  int64_t batch_, first_head_, heads_, rows_;
  alignas(64) float queries_[kRows][kDim];
  alignas(64) float scores_[kRows][kBlockKeys];
  RowState state_[kRows];
};

// Shares of one row become its result.
static void join(const Call& call, int64_t batch, int64_t head, int64_t row, const Part* parts,
                 int64_t shares, int64_t stride) {
  float largest = -kInfinity, sum = 0;
  for (int64_t share = 0; share < shares; ++share)
    if (!(parts[share * stride].largest <= largest)) largest = parts[share * stride].largest;
  float out[rounded_up(kValueDim, kLanes)] = {};
  for (int64_t share = 0; share < shares && largest != -kInfinity; ++share) {
    const Part& part = parts[share * stride];
    const float scale = part.largest == -kInfinity ? 0.0f : std::exp(part.largest - largest);
    sum += scale * part.sum;
    for (int e = 0; e < kValueDim; ++e) out[e] += scale * part.out[e];
  }
  finish_row(call, batch, head, row, largest, sum, out);
}

static Status decode(const Call& call) {
  // Lists of their own keep the heads of a group apart.
  const int64_t together = call.list_head_stride == 0 ? kGroup : 1;
  const int64_t groups = call.heads / together, rows = together * call.rows;
  int64_t longest = 0;
  for (int64_t batch = 0; batch < call.batch; ++batch)
    for (int64_t group = 0; group < groups; ++group) {
      const int32_t* offset = call.offsets + batch * call.list_batch_stride +
                              group * together * call.list_head_stride;
      if (offset[1] - offset[0] > longest) longest = offset[1] - offset[0];
    }
  // Two shares for each thread, that none waits long for another.
  int64_t shares = (2 * call.threads + call.batch * groups - 1) / (call.batch * groups);
  const int64_t most = longest / kLeastShare > 1 ? longest / kLeastShare : 1;
  shares = shares < most ? shares : most;
  const int64_t items = call.batch * groups * shares;
  auto parts = buffer_of<Part>(items * rows);
  if (!parts) return kNoMemory;
  std::atomic<int64_t> status{kDone};
#pragma omp parallel num_threads(items < call.threads ? items : call.threads)
  {
    auto memory = buffer_of<FewRows>(1);
    FewRows* few = memory.get();
    if (!few) status.store(kNoMemory);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      if (!few) continue;
      const int64_t share = item % shares, group = item / shares % groups;
      const int64_t batch = item / shares / groups, head = group * together;
      const int32_t* offset =
          call.offsets + batch * call.list_batch_stride + head * call.list_head_stride;
      const int64_t count = offset[1] - offset[0];
      const int64_t from = count * share / shares, to = count * (share + 1) / shares;
      Part* part = parts.get() + ((batch * groups + group) * shares + share) * rows;
      if (!few->start(call, batch, head, together) |
          !few->visit(call, call.blocks + offset[0] + from, to - from, part))
        status.store(kNotFinite);
    }
  }
  for (int64_t item = 0; item < call.batch * groups && status.load() == kDone; ++item)
    for (int64_t row = 0; row < rows; ++row)
      join(call, item / groups, item % groups * together + row / call.rows, row % call.rows,
           parts.get() + item * shares * rows + row, shares, rows);
  return Status(status.load());
}
