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
      const int64_t block = block_of(entries[i]), first = block * kBlockKeys;
      const int64_t rest = call.columns - first, keys = rest < kBlockKeys ? rest : kBlockKeys;
      for (int64_t row = 0; row < rows; row += kTogether)
        multiply_keys(call, first, keys, row, rows - row < kTogether ? rows - row : kTogether);
      finite &= weigh(call, block, is_cut(entries[i]), keys, parts);
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
        Floats sum[kTogether] = {};
#pragma GCC unroll 4
        for (int d = 0; d < kHeadDim; d += kLanes) {
          const Floats element = load_some<kHeadDim>(elements, d);
#pragma GCC unroll 4
          for (int i = 0; i < kTogether; ++i)
            sum[i] += element * load(queries_[row + (i < rows ? i : 0)] + d);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) sums[i][lane] = sum[i];
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
#pragma GCC unroll 4
        for (int vector = 0; vector < kWide / kLanes; ++vector) {
          const int at = e + vector * kLanes;
          const Floats element = at < kValueDim ? load_some<kValueDim>(elements, at) : Floats{};
#pragma GCC unroll 4
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

// Of the query heads from `head` on those blocks of their list that any row attends to, and how many:
// where rows are few, lists name more than that (kernels/cpu/runner.py).
static int64_t attended_blocks(const Call& call, int64_t batch, int64_t head, int64_t heads,
                               const int32_t* list, int64_t count, int32_t* found) {
  int64_t length = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t key = block_of(list[i]) * kBlockKeys, rest = call.columns - key;
    alignas(64) int32_t attended[kBlockKeys] = {};
    for (int64_t at = 0; is_cut(list[i]) && at < (kMaskOfHead ? heads : 1); ++at)
      for (int64_t row = 0; row < call.rows; ++row)
        mark_attended(call, batch, head + at, row, key, rest < kBlockKeys ? rest : kBlockKeys,
                      attended);
    int32_t any = !is_cut(list[i]);
    for (int k = 0; k < kBlockKeys; ++k) any |= attended[k];
    if (any) found[length++] = list[i];
  }
  return length;
}

// The work of a call: heads that share keys and a list, and shares of the keys of each.
struct Shares {
  // Lists of their own keep the heads of a group apart.
  explicit Shares(const Call& call)
      : together(call.list_head_stride == 0 ? kGroup : 1),
        groups(call.heads / together),
        all_groups(call.batch * groups),
        rows(together * call.rows),
        longest(0) {
    for (int64_t group = 0; group < all_groups; ++group)
      if (length_of(call, group) > longest) longest = length_of(call, group);
    // Two for each thread, that none waits long for another.
    const int64_t wanted = (2 * call.threads + all_groups - 1) / all_groups;
    const int64_t most = longest / kLeastShare > 1 ? longest / kLeastShare : 1;
    shares = wanted < most ? wanted : most;
  }

  int64_t batch_of(int64_t group) const { return group / groups; }
  int64_t head_of(int64_t group) const { return group % groups * together; }
  const int32_t* list_of(const Call& call, int64_t group) const {
    return call.offsets + batch_of(group) * call.list_batch_stride +
           head_of(group) * call.list_head_stride;
  }
  int64_t length_of(const Call& call, int64_t group) const {
    return list_of(call, group)[1] - list_of(call, group)[0];
  }

  int64_t together, groups, all_groups, rows, longest, shares;
};

static Status decode(const Call& call) {
  const Shares work(call);
  const int64_t items = work.all_groups * work.shares;
  auto parts = buffer_of<Part>(items * work.rows);
  auto blocks = buffer_of<int32_t>(work.all_groups * work.longest);
  auto counts = buffer_of<int64_t>(work.all_groups);
  if (!parts || !blocks || !counts) return kNoMemory;
  std::atomic<int64_t> status{kDone};
#pragma omp parallel num_threads(items < call.threads ? items : call.threads)
  {
    auto memory = buffer_of<FewRows>(1);
    FewRows* few = memory.get();
    if (!few) status.store(kNoMemory);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < work.all_groups; ++group)
      counts[group] = attended_blocks(call, work.batch_of(group), work.head_of(group),
                                      work.together, call.blocks + work.list_of(call, group)[0],
                                      work.length_of(call, group),
                                      blocks.get() + group * work.longest);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      if (!few) continue;
      const int64_t share = item % work.shares, group = item / work.shares;
      const int64_t from = counts[group] * share / work.shares;
      const int64_t to = counts[group] * (share + 1) / work.shares;
      const bool finite =
          few->start(call, work.batch_of(group), work.head_of(group), work.together) &
          few->visit(call, blocks.get() + group * work.longest + from, to - from,
                     parts.get() + item * work.rows);
      if (!finite) status.store(kNotFinite);
    }
  }
  for (int64_t group = 0; group < work.all_groups && status.load() == kDone; ++group)
    for (int64_t row = 0; row < work.rows; ++row)
      join(call, work.batch_of(group), work.head_of(group) + row / call.rows, row % call.rows,
           parts.get() + group * work.shares * work.rows + row, work.shares, work.rows);
  return Status(status.load());
}
