// The backward pass: blocks of keys in parallel, each over the blocks of query rows that meet it.
//
// With P the weights, recomputed from the statistics, and delta = sum_e dO O for each row:
//   dV = P^T dO     dP = dO V^T     dscore = P (dP - delta)     dS = dscore * d score / d S
//   dQ = scale * dS K     dK = scale * dS^T Q     d sink = -P(sink) * delta
// dQ is summed over the key blocks of one share at a time; shares are added in order, so that the
// result is the same each time for a given number of threads.
//
// Source: Dao et al., "FlashAttention", 2022, algorithm 4; its section B.4 for delta.
//
// Needs what forward.h needs, and from the generated source kGradientOfScore (the score is not S plus
// something) and gradient_row(), and sink_gradient() where there is a sink.

#pragma once

#include "forward.h"
#include "lists.h"

constexpr int kBlock = kBlockKeys;
static_assert(kBlockRows == kBlockKeys, "rows and keys are packed by the same functions");

// How one block lies in memory: its rows as the left factor of a product, transposed as the right
// factor over its dimension, in panels as the right factor over its rows.
template <int kDim, typename Word>
struct Layout {
  static constexpr int kColumns = rounded_up(kDim, kLanes);
  static constexpr int kRowWords = words_of<Word>(kDim);
  static constexpr int kRows = kBlock * kRowWords;
  static constexpr int kTransposed = kBlock * kRowWords;
  static constexpr int kPanels = kBlock / kInWord<Word> * kColumns;
};

template <int kDim, typename Word>
static bool pack_rows(const Number* from, int64_t row_stride, int64_t rows, Word* packed) {
  bool finite = true;
  for (int64_t row = 0; row < rows; ++row) {
    finite &= is_finite<kDim>(from + row * row_stride);
    pack_row<kDim>(from + row * row_stride, packed + row * words_of<Word>(kDim));
  }
  return finite;
}

static inline int64_t blocks_of(int64_t length) { return (length + kBlock - 1) / kBlock; }

static inline int64_t length_of_block(int64_t length, int64_t block) {
  return length - block * kBlock < kBlock ? length - block * kBlock : kBlock;
}

// All that the tiles read, and the sums of dQ.
template <typename Word>
struct BackwardMemory {
  using Queries = Layout<kHeadDim, Word>;
  using Values = Layout<kValueDim, Word>;

  const BackwardCall& backward;
  const Call& call;
  int64_t row_blocks, key_blocks, query_items, key_items, shares;
  Buffer<Word> query_rows, query_panels, grad_rows, grad_panels;
  Buffer<Word> keys, key_panels, values;
  Buffer<float> largest, inverse, delta, grad_q;

  explicit BackwardMemory(const BackwardCall& given)
      : backward(given),
        call(given.call),
        row_blocks(blocks_of(call.rows)),
        key_blocks(blocks_of(call.columns)),
        query_items(call.batch * call.heads * row_blocks),
        key_items(call.batch * call.heads / kGroup * key_blocks) {
    const int64_t heads = call.batch * call.heads / kGroup;
    shares = (call.threads + heads - 1) / heads;
    shares = shares < key_blocks ? shares : key_blocks;
    query_rows = buffer_of<Word>(query_items * Queries::kRows);
    query_panels = buffer_of<Word>(query_items * Queries::kPanels);
    grad_rows = buffer_of<Word>(query_items * Values::kRows);
    grad_panels = buffer_of<Word>(query_items * Values::kPanels);
    keys = buffer_of<Word>(key_items * Queries::kTransposed);
    key_panels = buffer_of<Word>(key_items * Queries::kPanels);
    values = buffer_of<Word>(key_items * Values::kTransposed);
    largest = buffer_of<float>(query_items * kBlock);
    inverse = buffer_of<float>(query_items * kBlock);
    delta = buffer_of<float>(query_items * kBlock);
    grad_q = buffer_of<float>(shares * query_items * kBlock * Queries::kColumns);
  }

  bool complete() const {
    return query_rows && query_panels && grad_rows && grad_panels && keys && key_panels && values &&
           largest && inverse && delta && grad_q;
  }

  float* grad_q_of(int64_t share, int64_t item) const {
    return grad_q.get() + (share * query_items + item) * kBlock * Queries::kColumns;
  }

  // Whether all is finite.
  bool fill() {
    std::atomic<bool> finite{true};
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t item = 0; item < key_items; ++item)
      if (!fill_keys(item)) finite.store(false, std::memory_order_relaxed);
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t item = 0; item < query_items; ++item)
      if (!fill_queries(item)) finite.store(false, std::memory_order_relaxed);
    return finite.load();
  }

  bool fill_keys(int64_t item) {
    const auto [batch, head, block] = place_of(item, call.heads / kGroup, key_blocks);
    const int64_t count = length_of_block(call.columns, block);
    const Number* key = row_of(call.k, batch, head, block * kBlock);
    const Number* value = row_of(call.v, batch, head, block * kBlock);
    pack_values<kHeadDim>(key, call.k.row_stride, count, key_panels.get() + item * Queries::kPanels);
    return pack_keys<kHeadDim>(key, call.k.row_stride, count,
                               keys.get() + item * Queries::kTransposed) &
           pack_keys<kValueDim>(value, call.v.row_stride, count,
                                values.get() + item * Values::kTransposed);
  }

  bool fill_queries(int64_t item) {
    const auto [batch, head, block] = place_of(item, call.heads, row_blocks);
    const int64_t first = block * kBlock;
    const int64_t count = length_of_block(call.rows, block);
    const Number* query = row_of(call.q, batch, head, first);
    const Number* grad = row_of(backward.grad_out, batch, head, first);
    const int64_t grad_stride = backward.grad_out.row_stride;
    bool finite = true;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t place = (batch * call.heads + head) * call.rows + first + row;
      const float most = call.statistics[2 * place], sum = call.statistics[2 * place + 1];
      // Of a row without keys every weight is 0, unless it is to be NaN.
      const bool empty = most == -kInfinity;
      if (kEmptyRow == EmptyRow::kNaN && empty) finite = false;
      largest.get()[item * kBlock + row] = empty ? 0.0f : most;
      inverse.get()[item * kBlock + row] = empty ? 0.0f : 1.0f / sum;
      delta.get()[item * kBlock + row] =
          dot(grad + row * grad_stride, row_of(call.out, batch, head, first + row));
    }
    for (int64_t share = 0; share < shares; ++share)
      std::memset(grad_q_of(share, item), 0, sizeof(float) * kBlock * Queries::kColumns);
    pack_values<kHeadDim>(query, call.q.row_stride, count,
                          query_panels.get() + item * Queries::kPanels);
    pack_values<kValueDim>(grad, grad_stride, count, grad_panels.get() + item * Values::kPanels);
    return finite & pack_rows<kHeadDim>(query, call.q.row_stride, count,
                               query_rows.get() + item * Queries::kRows) &
           pack_rows<kValueDim>(grad, grad_stride, count,
                                grad_rows.get() + item * Values::kRows);
  }

#if ADAATTN_HAS_SINK
  void add_sink_gradients() {
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t item = 0; item < query_items; ++item) {
      const auto [batch, head, block] = place_of(item, call.heads, row_blocks);
      for (int64_t row = 0; row < length_of_block(call.rows, block); ++row) {
        const int64_t at = item * kBlock + row, q = block * kBlock + row;
        const float sink = sink_of(call, batch, head, q);
        const float weight = exp_of(sink - largest.get()[at]) * inverse.get()[at];
        sink_gradient(backward, batch, head, q, -weight * delta.get()[at]);
      }
    }
  }
#endif

  static float dot(const Number* a, const Number* b) {
    float products[rounded_up(kValueDim, kLanes)] = {};
    for (int e = 0; e < kValueDim; ++e) products[e] = to_float(a[e]) * to_float(b[e]);
    Floats sum = {};
    for (int e = 0; e < rounded_up(kValueDim, kLanes); e += kLanes) sum += load(products + e);
    return sum_of(sum);
  }

  void finish_queries() {
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t item = 0; item < query_items; ++item) {
      const auto [batch, head, block] = place_of(item, call.heads, row_blocks);
      for (int64_t row = 0; row < length_of_block(call.rows, block); ++row) {
        float sum[kHeadDim] = {};
        for (int64_t share = 0; share < shares; ++share)
          for (int d = 0; d < kHeadDim; ++d)
            sum[d] += grad_q_of(share, item)[row * Queries::kColumns + d];
        Number* to =
            const_cast<Number*>(row_of(backward.grad_q, batch, head, block * kBlock + row));
        for (int d = 0; d < kHeadDim; ++d) to[d] = from_float<Number>(kScale * sum[d]);
      }
    }
  }
};

// Where one block of query rows meets one of keys.
struct Tile {
  int64_t batch, head, block, query, key, rows, keys, first_row, first_key;
  bool masked;

  template <typename Memory>
  Tile(const Memory& memory, int64_t batch, int64_t head, int64_t row_block, int64_t block,
       bool masked)
      : batch(batch),
        head(head),
        block(block),
        query((batch * memory.call.heads + head) * memory.row_blocks + row_block),
        key((batch * (memory.call.heads / kGroup) + head / kGroup) * memory.key_blocks + block),
        rows(length_of_block(memory.call.rows, row_block)),
        keys(length_of_block(memory.call.columns, block)),
        first_row(row_block * kBlock),
        first_key(block * kBlock),
        masked(masked) {}
};

// One block of keys, over all the query rows that meet it.
template <typename Word>
struct KeyBlock {
  using Memory = BackwardMemory<Word>;
  using Queries = typename Memory::Queries;
  using Values = typename Memory::Values;
  static constexpr bool kFloats = std::is_same_v<Word, float>;

  alignas(64) float grad_k[kBlock * Queries::kColumns];
  alignas(64) float grad_v[kBlock * Values::kColumns];
  alignas(64) float products[kBlock * kBlock];  // of queries and keys; kept for the score's gradient
  alignas(64) float weights[kBlock * kBlock];   // scores, then P
  alignas(64) float grads[kBlock * kBlock];     // dP, then dS
  alignas(64) float keep[kDropout > 0.0f ? kBlock * kBlock : 1];
  // The same in bfloat16: pairs of rows, and pairs of keys.
  alignas(64) Word weight_pairs[kFloats ? 1 : kBlock * kBlock / 2];
  alignas(64) Word grad_pairs[kFloats ? 1 : kBlock * kBlock / 2];
  alignas(64) Word grad_rows[kFloats ? 1 : kBlock * kBlock / 2];

  void compute(const Memory& memory, int64_t batch, int64_t kv_head, int64_t share, int64_t block,
               const RowLists& lists) {
    std::memset(grad_k, 0, sizeof grad_k);
    std::memset(grad_v, 0, sizeof grad_v);
    for (int64_t head = kv_head * kGroup; head < (kv_head + 1) * kGroup; ++head)
      for (const int32_t entry : lists.of(head - kv_head * kGroup, block))
        visit(memory, batch, head, share, block, block_of(entry), is_cut(entry));
    finish(memory, batch, kv_head, block);
  }

  void visit(const Memory& memory, int64_t batch, int64_t head, int64_t share, int64_t block,
             int64_t row_block, bool masked) {
    const Tile at(memory, batch, head, row_block, block, masked);
    multiply_both(memory, at);
    if constexpr (kGradientOfScore) std::memcpy(products, weights, sizeof products);
    weigh(memory, at);
    differentiate(memory, at);
    constexpr int64_t kDepth = kBlock / kInWord<Word>;
    multiply<Values::kColumns, true>(kBlock, left(weights, weight_pairs), kBlock,
                                     memory.grad_panels.get() + at.query * Values::kPanels, grad_v,
                                     Values::kColumns, kDepth, true);
    multiply<Queries::kColumns, true>(kBlock, left(grads, grad_pairs), kBlock,
                                      memory.query_panels.get() + at.query * Queries::kPanels,
                                      grad_k, Queries::kColumns, kDepth, true);
    multiply<Queries::kColumns>(at.rows, left(grads, grad_rows), kDepth,
                                memory.key_panels.get() + at.key * Queries::kPanels,
                                memory.grad_q_of(share, at.query), Queries::kColumns, kDepth, true);
  }

  // delta as the sum of P dP instead of dO O, for a block of rows. They differ by roundings that
  // count where P dP and delta should cancel: in rows of few keys, and where the gradient of a bias
  // is the sum of many of either sign.
  void refine_delta(const Memory& memory, int64_t item) {
    const Call& call = memory.call;
    const auto [batch, head, row_block] = place_of(item, call.heads, memory.row_blocks);
    const int32_t* offset =
        call.offsets + batch * call.list_batch_stride + head * call.list_head_stride + row_block;
    if (offset[1] - offset[0] > 1 && !memory.backward.gradients) return;
    float sums[kBlock] = {};
    for (int32_t place = offset[0]; place < offset[1]; ++place) {
      const int32_t entry = call.blocks[place];
      const Tile at(memory, batch, head, row_block, block_of(entry), is_cut(entry));
      multiply_both(memory, at);
      weigh(memory, at);
      for (int64_t row = 0; row < at.rows; ++row) {
        Floats sum = {};
        for (int lane = 0; lane < kBlock; lane += kLanes)
          sum += load(weights + row * kBlock + lane) * load(grads + row * kBlock + lane);
        sums[row] += sum_of(sum);
      }
    }
    std::memcpy(memory.delta.get() + item * kBlock, sums, sizeof sums);
  }

  void multiply_both(const Memory& memory, const Tile& at) {
    multiply<kBlock>(at.rows, memory.query_rows.get() + at.query * Queries::kRows,
                     Queries::kRowWords, memory.keys.get() + at.key * Queries::kTransposed, weights,
                     kBlock, Queries::kRowWords, false);
    multiply<kBlock>(at.rows, memory.grad_rows.get() + at.query * Values::kRows, Values::kRowWords,
                     memory.values.get() + at.key * Values::kTransposed, grads, kBlock,
                     Values::kRowWords, false);
  }

  static const Word* left(const float* floats, const Word* pairs) {
    if constexpr (kFloats)
      return floats;
    else
      return pairs;
  }

  // Products become weights, dropout taken off both them and dP.
  void weigh(const Memory& memory, const Tile& at) {
    const Call& call = memory.call;
    const float factor = finish_block(call, at.batch, at.head, at.first_row, at.rows, at.block,
                                      at.masked, weights, kBlock);
    for (int64_t row = 0; row < at.rows; ++row) {
      float* weight = weights + row * kBlock;
      const float largest = memory.largest.get()[at.query * kBlock + row];
      const float inverse = memory.inverse.get()[at.query * kBlock + row];
      for (int lane = 0; lane < kBlock; lane += kLanes)
        store(weight + lane,
              inverse * exp_of_negative<false>(scored(load(weight + lane), factor) - largest));
    }
    if constexpr (kDropout > 0.0f) {
      for (int64_t row = 0; row < at.rows; ++row) {
        const int64_t place = (at.batch * call.heads + at.head) * call.rows + at.first_row + row;
        float* kept = keep + row * kBlock;
        dropout_row(row_of_numbers(call.seed, place), at.first_key, kBlock, kDropout, kept);
        for (int key = 0; key < kBlock; ++key) grads[row * kBlock + key] *= kept[key];
      }
    }
  }

  // dP becomes dS.
  void differentiate(const Memory& memory, const Tile& at) {
    for (int64_t row = 0; row < at.rows; ++row) {
      float* weight = weights + row * kBlock;
      float* grad = grads + row * kBlock;
      const float delta = memory.delta.get()[at.query * kBlock + row];
      for (int lane = 0; lane < kBlock; lane += kLanes) {
        const Floats p = load(weight + lane);
        store(grad + lane, p * (load(grad + lane) - delta));
        if constexpr (kDropout > 0.0f) store(weight + lane, p * load(keep + row * kBlock + lane));
      }
      if (kGradientOfScore || memory.backward.gradients)
        gradient_row(memory.backward, at.batch, at.head, at.first_row + row, at.first_key, at.keys,
                     products + row * kBlock, grad);
    }
    // Panels are as deep as a block.
    const int64_t rest = (kBlock - at.rows) * kBlock * sizeof(float);
    std::memset(weights + at.rows * kBlock, 0, rest);
    std::memset(grads + at.rows * kBlock, 0, rest);
    if constexpr (!kFloats) round_tiles();
  }

  void round_tiles() {
    for (int64_t row = 0; row < kBlock; row += 2)
      for (int lane = 0; lane < kBlock; lane += kLanes) {
        const int64_t at = row * kBlock + lane, pair = row / 2 * kBlock + lane;
        store_pairs(weight_pairs + pair, load(weights + at), load(weights + at + kBlock));
        store_pairs(grad_pairs + pair, load(grads + at), load(grads + at + kBlock));
      }
    for (int64_t at = 0; at < kBlock * kBlock; at += kLanes)
      store_rounded(reinterpret_cast<Bfloat16*>(grad_rows) + at, load(grads + at));
  }

  void finish(const Memory& memory, int64_t batch, int64_t kv_head, int64_t block) {
    const BackwardCall& backward = memory.backward;
    for (int64_t row = 0; row < length_of_block(memory.call.columns, block); ++row) {
      const int64_t at = block * kBlock + row;
      Number* to_k = const_cast<Number*>(row_of(backward.grad_k, batch, kv_head, at));
      Number* to_v = const_cast<Number*>(row_of(backward.grad_v, batch, kv_head, at));
      for (int d = 0; d < kHeadDim; ++d)
        to_k[d] = from_float<Number>(kScale * grad_k[row * Queries::kColumns + d]);
      for (int e = 0; e < kValueDim; ++e)
        to_v[e] = from_float<Number>(grad_v[row * Values::kColumns + e]);
    }
  }
};

template <typename Word>
static Status backward_in(const BackwardCall& given) {
  BackwardMemory<Word> memory(given);
  if (!memory.complete()) return kNoMemory;
  if (!memory.fill()) return kNotFinite;
  const int64_t heads = memory.call.heads / kGroup;
  const int64_t items = memory.call.batch * heads * memory.shares;
  std::atomic<int64_t> status{kDone};
  // Round robin, not as threads come free: the same thread sums the same gradients each time.
#pragma omp parallel num_threads(memory.call.threads)
  {
    auto held = buffer_of<KeyBlock<Word>>(1);
    KeyBlock<Word>* block = held.get();
    RowLists lists(memory.call, memory.row_blocks, memory.key_blocks);
    if (!block || !lists.complete()) status.store(kNoMemory);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < memory.query_items; ++item)
      if (block) block->refine_delta(memory, item);
#pragma omp for schedule(static, 1)
    for (int64_t item = 0; item < items; ++item) {
      if (status.load() != kDone) continue;
      const auto [batch, head, share] = place_of(item, heads, memory.shares);
      lists.fill(batch, head);
      for (int64_t key = share; key < memory.key_blocks; key += memory.shares)
        block->compute(memory, batch, head, share, key, lists);
    }
  }
  if (status.load() != kDone) return Status(status.load());
  memory.finish_queries();
#if ADAATTN_HAS_SINK
  memory.add_sink_gradients();
#endif
  return Status(status.load());
}

static Status backward_in_precision(const BackwardCall& given) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Number, Bfloat16>) return backward_in<uint32_t>(given);
#endif
  return backward_in<float>(given);
}
