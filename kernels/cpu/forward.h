// The forward pass of a block of query rows over its list of key blocks.
//
// Needs, from the generated source: Number (of q, k, v and out), kHeadDim, kValueDim, kGroup, kScale,
// kScaleIsExact (it is a power of 2), kMaskOfHead (heads have masks of their own), kPlain (the score
// is S itself and kScale is positive), kDropout (the probability), kEmptyRow, kMixedPrecision (plans
// may ask for bfloat16), score_row<kMasked>(), mark_attended() and, where there is a sink, sink_of()
// and ADAATTN_HAS_SINK.

#pragma once

#include "dropout.h"
#include "panels.h"
#include "softmax.h"

// Query rows of a block, and key blocks that one step of the online softmax takes together.
constexpr int kBlockRows = 64, kStepBlocks = 4;
constexpr int kStepKeys = kStepBlocks * kBlockKeys;

// Products of a block become scores, but for a factor, which is returned.
static inline float finish_block(const Call& call, int64_t batch, int64_t head, int64_t first_row,
                                 int64_t rows, int64_t block, bool masked, float* scores,
                                 int64_t stride) {
  const int64_t key = block * kBlockKeys;
  const int64_t keys = call.columns - key < kBlockKeys ? call.columns - key : kBlockKeys;
  if (kPlain && !masked && keys == kBlockKeys && !call.key_bias) return kScale;
  for (int64_t row = 0; row < rows; ++row) {
    float* row_scores = scores + row * stride;
    if (masked)
      score_row<true>(call, batch, head, first_row + row, key, keys, row_scores);
    else
      score_row<false>(call, batch, head, first_row + row, key, keys, row_scores);
    for (int64_t i = keys; i < kBlockKeys; ++i) row_scores[i] = -kInfinity;
    if (call.key_bias) {
      const float* bias = call.key_bias + batch * call.key_bias_batch_stride +
                          head * call.key_bias_head_stride + key;
      for (int64_t i = 0; i < keys; ++i) row_scores[i] += bias[i];
    }
  }
  return 1.0f;
}

// Strips of a block of query rows, as the products take them.
constexpr int kStrips = (kBlockRows + kTileRows - 1) / kTileRows;

// Of each strip of rows the keys of a block from the first to the last that any of them attends to;
// in pairs, as bfloat16 takes them.
static inline void find_parts(const Call& call, int64_t batch, int64_t head, int64_t first_row,
                              int64_t rows, int64_t block, Range* parts) {
  const int64_t key = block * kBlockKeys;
  const int64_t keys = call.columns - key < kBlockKeys ? call.columns - key : kBlockKeys;
  for (int64_t strip = 0; strip * kTileRows < rows; ++strip) {
    alignas(64) int32_t attended[kBlockKeys] = {};
    for (int64_t row = strip * kTileRows; row < rows && row < (strip + 1) * kTileRows; ++row)
      mark_attended(call, batch, head, first_row + row, key, keys, attended);
    int from = 0, to = kBlockKeys;
    while (from < to && !attended[from]) ++from;
    while (from < to && !attended[to - 1]) --to;
    parts[strip] = {from / 2 * 2, (to + 1) / 2 * 2};
  }
}

static void fill_empty_row(const Call& call, int64_t batch, int64_t head, Number* to) {
  if constexpr (kEmptyRow == EmptyRow::kUniform) {
    double sum[kValueDim] = {};
    for (int64_t key = 0; key < call.columns; ++key)
      for (int e = 0; e < kValueDim; ++e) sum[e] += to_float(row_of(call.v, batch, head, key)[e]);
    for (int e = 0; e < kValueDim; ++e) to[e] = from_float<Number>(float(sum[e] / call.columns));
  } else {
    for (int e = 0; e < kValueDim; ++e)
      to[e] = from_float<Number>(kEmptyRow == EmptyRow::kNaN ? kNaN : 0.0f);
  }
}

// The sink's part in a row's maximum and sum; what its weighted sum of values is to be multiplied by.
static inline float with_sink(const Call& call, int64_t batch, int64_t head, int64_t row,
                              float& largest, float& sum) {
  float scale = 1.0f;
#if ADAATTN_HAS_SINK
  const float sink = sink_of(call, batch, head, row);
  const float both = largest > sink ? largest : sink;
  scale = largest == -kInfinity ? 0.0f : exp_of(largest - both);
  sum = sum * scale + (sink == -kInfinity ? 0.0f : exp_of(sink - both));
  largest = both;
#endif
  return scale;
}

// Joins a row's part, over keys that it has not met yet, to what `out` and `lse` hold of the others.
static void join_row(const Call& call, float lse, int64_t place, float factor, const float* weighted,
                     Number* to) {
  const float before = call.lse[place], both = lse > before ? lse : before;
  if (lse == -kInfinity) return;
  const float old_part = before == -kInfinity ? 0.0f : exp_of(before - both);
  const float new_part = exp_of(lse - both), whole = old_part + new_part;
  call.lse[place] = both + log_of(whole);
  const float keep = old_part / whole, add = new_part / whole * factor;
  for (int e = 0; e < kValueDim; ++e) {
    const float old = before == -kInfinity ? 0.0f : to_float(to[e]) * keep;  // `out` may be NaN there
    to[e] = from_float<Number>(old + weighted[e] * add);
  }
}

// The result of one row from its maximum, its sum and its weighted sum of values.
static void finish_row(const Call& call, int64_t batch, int64_t head, int64_t row, float largest,
                       float sum, const float* weighted) {
  const float scale = with_sink(call, batch, head, row, largest, sum);
  const int64_t place = (batch * call.heads + head) * call.rows + row;
  const bool wants_lse = call.lse && largest != -kInfinity;
  const float lse = wants_lse ? largest + log_of(sum) : -kInfinity;
  if (call.statistics) {
    call.statistics[2 * place] = largest;
    call.statistics[2 * place + 1] = sum;
  }
  Number* to = const_cast<Number*>(row_of(call.out, batch, head, row));
  if (call.joins) return join_row(call, lse + float(call.log_count), place, scale / sum, weighted, to);
  if (call.lse) call.lse[place] = lse;
  if (largest == -kInfinity) return fill_empty_row(call, batch, head / kGroup, to);
  const float inverse = scale / sum;
  for (int e = 0; e < kValueDim; ++e) to[e] = from_float<Number>(weighted[e] * inverse);
}

// One block of query rows on its way through the keys.
template <typename KeyWord, typename ValueWord>
struct QueryBlock {
  using Weight = std::conditional_t<std::is_same_v<ValueWord, float>, float, Bfloat16>;
  static constexpr int kQueryWords = words_of<KeyWord>(kHeadDim);
  static constexpr int kOut = rounded_up(kValueDim, kLanes);

  alignas(64) KeyWord queries[kBlockRows * kQueryWords];
  alignas(64) float scores[kBlockRows * kStepKeys];
  alignas(64) Weight weights[std::is_same_v<Weight, float> ? 1 : kBlockRows * kStepKeys];
  alignas(64) float out[kBlockRows * kOut];
  RowState state[kBlockRows];
  int64_t batch, head, first, rows;
  float skip;
  int64_t skipped_rows;  // how often one of them has skipped a block
  ScreenedRows<kCanScreen ? kBlockRows : 1> screened;
  int64_t screens_tried, screens_kept;  // how many strips of rows, in how many a block was left

  // Whether all its queries are finite.
  bool start(const Call& call, int64_t at_batch, int64_t at_head, int64_t at_block) {
    batch = at_batch, head = at_head, first = at_block * kBlockRows;
    rows = call.rows - first < kBlockRows ? call.rows - first : kBlockRows;
    skip = skip_of(call, batch, head);
    skipped_rows = screens_tried = screens_kept = 0;
    bool finite = true;
    for (int64_t row = 0; row < rows; ++row) {
      const Number* query = row_of(call.q, batch, head, first + row);
      fetch<kHeadDim>(query + kRowsAhead * call.q.row_stride);
      finite &= is_finite<kHeadDim, KeyWord>(query);
      pack_row<kHeadDim>(query, queries + row * kQueryWords);
      state[row] = RowState{};
    }
    std::memset(out, 0, sizeof(float) * rows * kOut);
    return finite;
  }

  // The query rows in whole numbers.
  void start_screening(const Call& call) {
    constexpr bool kInPairs = !std::is_same_v<KeyWord, float>;
    for (int64_t row = 0; row < rows; ++row)
      screened.set(row, row_of(call.q, batch, head, first + row), {!kInPairs, kInPairs});
    screened.clear_from(rows);
  }

  // The strips of which no row can have a score in a block that it does not skip, as bits.
  uint32_t screen(const uint32_t* keys) {
    // It takes half of what it saves: where strips need many of the blocks no more are tried.
    if (screens_tried >= 2 * kStrips && 5 * screens_kept > 2 * screens_tried) return 0;
    alignas(64) float below[decltype(screened)::kRows] = {};
    for (int64_t row = 0; row < rows; ++row) below[row] = state[row].largest - skip;
    ScreenedBlock block;
    std::memcpy(&block, keys + kScreenWords * kBlockKeys, sizeof block);
    screened.limit(block, below, rows);
    uint32_t left_out = 0;
    const int strips = int((rows + kTileRows - 1) / kTileRows);
    for (int strip = 0; strip < strips; ++strip)
      if (!screened.reaches(strip, keys)) left_out |= 1u << strip;
    screens_tried += strips, screens_kept += strips - __builtin_popcount(left_out);
    return left_out;
  }

  // Up to kStepBlocks key blocks at a time. screens: whether they can be screened.
  void visit(const Call& call, const PackedKeys& packed, const int32_t* entries, int64_t count,
             bool screens) {
    float factor[kStepBlocks];
    Range parts[kStepBlocks][kStrips];
    uint32_t skipped[kStrips] = {};  // of the step's blocks, as bits
    const uint32_t every_strip = (1u << ((rows + kTileRows - 1) / kTileRows)) - 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = block_of(entries[i]);
      const bool masked = is_cut(entries[i]);
      const KeyWord* keys = packed.keys_of<KeyWord>(batch, head / kGroup, block);
      float* products = scores + i * kBlockKeys;
      uint32_t left_out = 0;
      if constexpr (kCanScreen)
        if (screens && !masked) left_out = screen(packed.screen_of(batch, head / kGroup, block));
      for (int strip = 0; strip < kStrips; ++strip) {
        skipped[strip] |= (left_out >> strip & 1u) << i;
        parts[i][strip] = left_out >> strip & 1 ? Range{0, 0} : Range{0, kBlockKeys};
      }
      if (masked) find_parts(call, batch, head, first, rows, block, parts[i]);
      factor[i] = 1.0f;
      if (left_out == every_strip) continue;
      // Products outside of the parts are left as they were: finish_block makes those that the mask
      // shuts out -inf, those that are screened out nothing reads.
      if (masked || left_out)
        multiply_columns<kBlockKeys>(rows, queries, kQueryWords, keys, products, kStepKeys,
                                     kQueryWords, parts[i]);
      else
        multiply<kBlockKeys>(rows, queries, kQueryWords, keys, products, kStepKeys, kQueryWords,
                             false);
      factor[i] = finish_block(call, batch, head, first, rows, block, masked, products, kStepKeys);
    }
    weigh(call, entries, factor, count, skipped);
    for (int64_t i = 0; i < count; ++i) add_values(packed, entries[i], i, parts[i], skipped);
  }

  // The i-th block of a step, for the strips that do not skip it.
  void add_values(const PackedKeys& packed, int32_t entry, int64_t i, Range* parts,
                  const uint32_t* skipped) {
    constexpr int kWord = kInWord<ValueWord>;
    const int strips = int((rows + kTileRows - 1) / kTileRows);
    if (is_cut(entry))  // from keys to words
      for (int strip = 0; strip < strips; ++strip)
        parts[strip] = {parts[strip].from / kWord, parts[strip].to / kWord};
    int left_out = 0;
    for (int strip = 0; strip < strips; ++strip) left_out += skipped[strip] >> i & 1;
    if (left_out == strips) return;
    if (left_out > 0)
      for (int strip = 0; strip < strips; ++strip) {
        if (!is_cut(entry)) parts[strip] = {0, kBlockKeys / kWord};
        if (skipped[strip] >> i & 1) parts[strip] = {0, 0};
      }
    multiply<kOut>(rows, weight_words() + i * kBlockKeys / kWord, kStepKeys / kWord,
                   packed.values_of<ValueWord>(batch, head / kGroup, block_of(entry)), out, kOut,
                   kBlockKeys / kWord, true, is_cut(entry) || left_out > 0 ? parts : nullptr);
  }

  // Scores become weights, but for the blocks of the step that a row skips; those that all rows of a
  // strip skip are written: with them nothing is multiplied. By strips and not by blocks of rows, as
  // the products are: where some rows have found their largest score, others still look for it.
  // skipped: at first those that were screened out, whose scores nobody knows.
  void weigh(const Call& call, const int32_t* entries, const float* factor, int64_t count,
             uint32_t* skipped) {
    alignas(64) float kept[kDropout > 0.0f ? kStepKeys : 1];
    const uint32_t every = (1u << count) - 1;
    float largest = 0;
    uint32_t screened_out = 0;
    for (int64_t row = 0; row < rows; ++row) {
      uint32_t own = 0;
      if (skip < kInfinity) {
        uint32_t& of_strip = skipped[row / kTileRows];
        if (row % kTileRows == 0) screened_out = of_strip;
        if (screened_out == every) {
          skipped_rows += count;
          continue;
        }
        own = find_skipped<kBlockKeys, kStepBlocks>(skip, state[row], scores + row * kStepKeys, factor,
                                                    count, screened_out, largest);
        skipped_rows += __builtin_popcount(own);
        of_strip = row % kTileRows == 0 ? own : of_strip & own;
      }
      if constexpr (kDropout > 0.0f) {
        const int64_t place = (batch * call.heads + head) * call.rows + first + row;
        const uint32_t numbers = row_of_numbers(call.seed, place);
        for (int64_t i = 0; i < count; ++i)
          dropout_row(numbers, block_of(entries[i]) * kBlockKeys, kBlockKeys, kDropout,
                      kept + i * kBlockKeys);
      }
      float* row_scores = scores + row * kStepKeys;
      Weight* row_weights;
      if constexpr (std::is_same_v<Weight, float>)
        row_weights = row_scores;
      else
        row_weights = weights + row * kStepKeys;
      const float* dropout = kDropout > 0.0f ? kept : nullptr;
      const float scale =
          skip < kInfinity
              ? weigh_below<kBlockKeys>(largest, state[row], row_scores, factor, count, own, dropout,
                                        row_weights)
              : weigh_row<kBlockKeys>(state[row], row_scores, factor, count, dropout, row_weights);
      if (scale != 1.0f)
        for (int e = 0; e < kOut; e += kLanes)
          store(out + row * kOut + e, load(out + row * kOut + e) * scale);
    }
  }

  const ValueWord* weight_words() const {
    if constexpr (std::is_same_v<Weight, float>)
      return scores;
    else
      return reinterpret_cast<const ValueWord*>(weights);
  }

  void finish(const Call& call) {
    for (int64_t row = 0; row < rows; ++row)
      finish_row(call, batch, head, first + row, state[row].largest, sum_of(state[row].sum),
                 out + row * kOut);
    if (call.skipped && skipped_rows > 0)
      __atomic_fetch_add(call.skipped + batch * call.heads + head, skipped_rows, __ATOMIC_RELAXED);
  }

  // Whether all queries are finite.
  bool run(const Call& call, const PackedKeys& packed, int64_t at_batch, int64_t at_head,
           int64_t at_block) {
    const bool finite = start(call, at_batch, at_head, at_block);
    const int32_t* offset = call.offsets + batch * call.list_batch_stride +
                            head * call.list_head_stride + at_block;
    // In the first step a row's largest score is not known yet. Products say nothing of biases.
    const bool screens = kCanScreen && skip < kInfinity && !call.key_bias &&
                         offset[1] - offset[0] > kStepBlocks;
    if constexpr (kCanScreen)
      if (screens) start_screening(call);
    for (int64_t entry = offset[0]; entry < offset[1]; entry += kStepBlocks) {
      const int64_t left = offset[1] - entry;
      visit(call, packed, call.blocks + entry, left < kStepBlocks ? left : kStepBlocks,
            screens && entry > offset[0]);
    }
    finish(call);
    return finite;
  }
};
