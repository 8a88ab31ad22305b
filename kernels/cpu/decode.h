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

// The rows of a call, as a number and by their places among the queries.
static inline int64_t rows_of(const Call& call) { return call.places ? call.place_count : call.rows; }
static inline int64_t row_at(const Call& call, int64_t i) { return call.places ? call.places[i] : i; }

// What one share leaves of one row.
struct Part {
  float largest, sum;
  float out[rounded_up(kValueDim, 2 * kLanes)];
};

// Rows of keys or values that are read next, fetched while others are computed with: by itself the
// machine looks ahead as far as a block reaches, and no further, as keys and values take turns.
// Into the second cache: in the first, those in use and those to come would push each other out.
template <int kDim>
struct Ahead {
  const Number* rows;
  int64_t stride, count;

  // Always inline: GCC drops calls of what does nothing but prefetch.
  __attribute__((always_inline)) void fetch(int64_t row) const {
    if (row >= count) return;
#pragma GCC unroll 16
    for (int d = 0; d < kDim; d += int(64 / sizeof(Number)))
      __builtin_prefetch(rows + row * stride + d, 0, 2);
  }
};

// The rows of the query heads that share a key head, and blocks, on one share of the keys: in floats,
// or in words of two bfloat16.
template <typename Word>
class FewRows {
 public:
  using Weight = std::conditional_t<std::is_same_v<Word, float>, float, Bfloat16>;
  using Vector = std::conditional_t<std::is_same_v<Word, float>, Floats, Words>;
  static constexpr int kMostRows = kGroup * kFewRows;
  static constexpr int kQueryWords = rounded_up(words_of<Word>(kHeadDim), kLanes);
  static constexpr int kOut = rounded_up(kValueDim, kInWord<Word> * kLanes);

  // Whether all queries are finite.
  bool start(const Call& call, int64_t batch, int64_t first_head, int64_t heads) {
    batch_ = batch, first_head_ = first_head, heads_ = heads, rows_ = rows_of(call);
    bool finite = true;
    std::memset(queries_, 0, sizeof queries_);
    for (int64_t row = 0; row < heads * rows_; ++row) {
      const Number* query = row_of(call.q, batch, head_of(row), row_at(call, row % rows_));
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
      const int64_t block = block_of(entries[i]), keys = keys_in(call, block);
      const Ahead<kValueDim> values = ahead_of<kValueDim>(call, call.v, block);
      int64_t row = 0;
      for (; row + kTogether <= rows; row += kTogether)
        multiply_keys<kTogether>(call, block, keys, row, values);
      for (; row + 2 <= rows; row += 2) multiply_keys<2>(call, block, keys, row, values);
      for (; row < rows; ++row) multiply_keys<1>(call, block, keys, row, values);
      finite &= weigh(call, block, is_cut(entries[i]), keys, parts);
      const Ahead<kHeadDim> next =
          ahead_of<kHeadDim>(call, call.k, i + 1 < count ? block_of(entries[i + 1]) : block);
      for (row = 0; row + kTogether <= rows; row += kTogether)
        add_values<kTogether>(call, block, keys, row, next, parts);
      for (; row + 2 <= rows; row += 2) add_values<2>(call, block, keys, row, next, parts);
      for (; row < rows; ++row) add_values<1>(call, block, keys, row, next, parts);
    }
    for (int64_t row = 0; row < rows; ++row) {
      parts[row].largest = state_[row].largest;
      parts[row].sum = sum_of(state_[row].sum);
      finite &= is_finite<kOut>(parts[row].out);
    }
    return finite;
  }

 private:
  // Rows that are computed together.
  static constexpr int kTogether = 4;
  static_assert(kLanes % kTogether == 0, "rows and keys share the lanes of a vector");

  int64_t head_of(int64_t row) const { return first_head_ + row / rows_; }

  static int64_t keys_in(const Call& call, int64_t block) {
    const int64_t rest = call.columns - block * kBlockKeys;
    return rest < kBlockKeys ? rest : kBlockKeys;
  }

  // The first row of a block of K or V.
  const Number* block_of_rows(const Tensor& tensor, int64_t block) const {
    return row_of(tensor, batch_, first_head_ / kGroup, block * kBlockKeys);
  }

  template <int kDim>
  Ahead<kDim> ahead_of(const Call& call, const Tensor& tensor, int64_t block) const {
    return {block_of_rows(tensor, block), tensor.row_stride, keys_in(call, block)};
  }

  // Products of kRows rows and a block of keys, as many at a time as make a vector: each by vectors
  // over its elements, whose lanes are summed for all of them at once.
  template <int kRows>
  void multiply_keys(const Call& call, int64_t block, int64_t keys, int64_t row,
                     const Ahead<kValueDim>& values) {
    constexpr int kKeys = kLanes / kRows;
    const Number* first = block_of_rows(call.k, block);
    for (int64_t key = 0; key < keys; key += kKeys) {
      for (int64_t i = 0; row == 0 && i < kKeys; ++i) values.fetch(key + i);
      Floats sums[kRows * kKeys] = {};
#pragma GCC unroll 4
      for (int word = 0; word < kQueryWords; word += kLanes)
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const int64_t at = key + i < keys ? key + i : keys - 1;
          const Vector element =
              load_words<kHeadDim, Word>(first + at * call.k.row_stride, word);
#pragma GCC unroll 4
          for (int j = 0; j < kRows; ++j)
            sums[j * kKeys + i] =
                multiply_add(sums[j * kKeys + i], element, load(queries_[row + j] + word));
        }
      const Floats products = sums_of(sums);
      for (int j = 0; j < kRows; ++j)
        std::memcpy(scores_[row + j] + key, reinterpret_cast<const float*>(&products) + j * kKeys,
                    kKeys * sizeof(float));
    }
  }

  bool weigh(const Call& call, int64_t block, bool masked, int64_t keys, Part* parts) {
    bool finite = true;
    for (int64_t row = 0; row < heads_ * rows_; ++row) {
      uint32_t bad = 0;
      for (int64_t key = 0; key < keys; ++key)
        bad |= (bits_of(scores_[row][key]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
      finite &= bad == 0;
      const float factor = finish_block(call, batch_, head_of(row), row_at(call, row % rows_), 1,
                                        block, masked, scores_[row], kBlockKeys);
      alignas(64) float kept[kBlockKeys];
      if constexpr (kDropout > 0.0f) {
        const int64_t place = (batch_ * call.heads + head_of(row)) * call.rows +
                              row_at(call, row % rows_);
        dropout_row(row_of_numbers(call.seed, place), block * kBlockKeys, kBlockKeys, kDropout,
                    kept);
      }
      const float scale = weigh_row<kBlockKeys>(state_[row], scores_[row], &factor, 1,
                                                kDropout > 0.0f ? kept : nullptr, weights_[row]);
      if (scale != 1.0f)
        for (int e = 0; e < kOut; e += kLanes)
          store(parts[row].out + e, load(parts[row].out + e) * scale);
    }
    return finite;
  }

  // Weights times values, summed over a block of keys: one, or a pair of them, at a time.
  template <int kRows>
  void add_values(const Call& call, int64_t block, int64_t keys, int64_t row,
                  const Ahead<kHeadDim>& next, Part* parts) {
    constexpr int kStep = kInWord<Word>, kMost = kLanes < 16 && kRows > 1 ? 2 : 4;
    constexpr int kVectors = kOut / kLanes < kMost ? kOut / kLanes : kMost;
    const Number* first = block_of_rows(call.v, block);
    for (int e = 0; e < kOut; e += kVectors * kLanes) {
      Floats sums[kRows][kVectors] = {};
      for (int64_t key = 0; key < keys; key += kStep) {
        for (int64_t i = 0; row == 0 && e == 0 && i < kStep; ++i) next.fetch(key + i);
        const Number* elements = first + key * call.v.row_stride;
        const Number* neighbours = key + kStep <= keys ? elements + (kStep - 1) * call.v.row_stride
                                                       : elements;
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; vector += kStep) {
          Vector values[kStep] = {};
          if (e + vector * kLanes < kValueDim)
            load_step(elements, neighbours, (e + vector * kLanes) / kStep, values);
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            Word weight;
            std::memcpy(&weight, &weights_[row + i][key], sizeof weight);
#pragma GCC unroll 2
            for (int part = 0; part < kStep; ++part)
              sums[i][vector + part] =
                  multiply_add(sums[i][vector + part], all(weight), values[part]);
          }
        }
      }
      const int left = kOut - e < kVectors * kLanes ? kOut - e : kVectors * kLanes;
      for (int i = 0; i < kRows; ++i) add_sums(sums[i], left, parts[row + i].out + e);
    }
  }

  // Elements of one key; of a pair of keys each two as a word, those at even places and those at odd.
  static void load_step(const Number* one, const Number* other, int word, Vector* values) {
    values[0] = load_words<kValueDim, Word>(one, word);
    if constexpr (kInWord<Word> == 2) {
      const Words low = values[0], high = load_words<kValueDim, Word>(other, word);
      values[0] = (low & 0xffffu) | high << 16;
      values[1] = low >> 16 | (high & 0xffff0000u);
    }
  }

  // Sums as load_step has them, added to an output.
  static void add_sums(const Floats* sums, int size, float* out) {
    for (int e = 0; e < size; e += kInWord<Word> * kLanes, sums += kInWord<Word>) {
      Floats low = sums[0];
      if constexpr (kInWord<Word> == 2) {
        low = zipped<0>(sums[0], sums[1], Lanes());
        const Floats high = zipped<kLanes / 2>(sums[0], sums[1], Lanes());
        store(out + e + kLanes, load(out + e + kLanes) + high);
      }
      store(out + e, load(out + e) + low);
    }
  }

  int64_t batch_, first_head_, heads_, rows_;
  alignas(64) Word queries_[kMostRows][kQueryWords];
  alignas(64) float scores_[kMostRows][kBlockKeys];
  alignas(64) Weight weights_[kMostRows][kBlockKeys];
  RowState state_[kMostRows];
};

// What one row was computed as, beside what it is. Of a row without a key nothing can be said.
static void compare(const Call& call, int64_t batch, int64_t head, int64_t row, float largest,
                    float sum, const float* weighted) {
  const float scale = with_sink(call, batch, head, row, largest, sum);
  if (largest == -kInfinity) return;
  const Number* given = row_of(call.out, batch, head, row);
  double wrong = 0, whole = 0;
  for (int e = 0; e < kValueDim; ++e) {
    const double exact = weighted[e] * scale / sum, error = to_float(given[e]) - exact;
    wrong += error * error, whole += exact * exact;
  }
  double* compared = call.compared + (batch * call.heads + head) * 2;
  compared[0] += wrong, compared[1] += whole;
}

// Shares of one row become its result.
static void join(const Call& call, int64_t batch, int64_t head, int64_t row, const Part* parts,
                 int64_t shares, int64_t stride) {
  float largest = -kInfinity, sum = 0;
  for (int64_t share = 0; share < shares; ++share)
    if (!(parts[share * stride].largest <= largest)) largest = parts[share * stride].largest;
  float out[rounded_up(kValueDim, kLanes)] = {};
  for (int64_t share = 0; share < shares && largest != -kInfinity; ++share) {
    const Part& part = parts[share * stride];
    const float scale = part.largest == -kInfinity ? 0.0f : exp_of(part.largest - largest);
    sum += scale * part.sum;
    for (int e = 0; e < kValueDim; ++e) out[e] += scale * part.out[e];
  }
  if (call.places)
    compare(call, batch, head, row_at(call, row), largest, sum, out);
  else
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
      for (int64_t row = 0; row < rows_of(call); ++row)
        mark_attended(call, batch, head + at, row_at(call, row), key, rest < kBlockKeys ? rest : kBlockKeys,
                      attended);
    int32_t any = !is_cut(list[i]);
    for (int k = 0; k < kBlockKeys; ++k) any |= attended[k];
    if (any) found[length++] = list[i];
  }
  return length;
}

// The work of a call: heads that share keys and a list, and shares of the keys of each.
struct Shares {
  // Lists of their own keep the heads of a group apart, but in an audit, where a group has one.
  explicit Shares(const Call& call)
      : together(call.list_head_stride == 0 || call.places ? kGroup : 1),
        groups(call.heads / together),
        all_groups(call.batch * groups),
        rows(together * rows_of(call)),
        longest(0) {
    int64_t busy = 0;  // groups with any keys
    for (int64_t group = 0; group < all_groups; ++group) {
      busy += length_of(call, group) > 0;
      if (length_of(call, group) > longest) longest = length_of(call, group);
    }
    // Two for each thread, that none waits long for another.
    const int64_t wanted = busy ? (2 * call.threads + busy - 1) / busy : all_groups > 0;
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

template <typename Word>
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
    auto memory = buffer_of<FewRows<Word>>(1);
    FewRows<Word>* few = memory.get();
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
  const int64_t each = rows_of(call);
  for (int64_t group = 0; group < work.all_groups && status.load() == kDone; ++group) {
    if (call.places && work.length_of(call, group) == 0) continue;  // not audited
    for (int64_t row = 0; row < work.rows; ++row)
      join(call, work.batch_of(group), work.head_of(group) + row / each, row % each,
           parts.get() + group * work.shares * work.rows + row, work.shares, work.rows);
  }
  return Status(status.load());
}
