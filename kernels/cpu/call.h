// What one call is given; kernels/cpu/call.py fills it, member by member, each of 64 bits.

#pragma once

#include <cstdint>

// [B, heads, length, dim]; the last stride is 1, the others are in elements.
struct Tensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// A tensor that the score, the mask or the sink reads; strides in elements.
struct Operand {
  const void* data;
  int64_t stride[4];
};

struct Call {
  Tensor q, k, v, out;
  // What the forward pass leaves beside `out`, null where nobody asks for it, of each row [B, H, M]:
  float* lse;         // the logarithm of the sum of exp(score), natural
  float* statistics;  // [2]: the largest score, and the sum of exp(score - largest)
  int64_t batch, heads, rows, columns;
  const Operand* operands;
  const int64_t* params;

  // The plan. Block lists: list i of (b, h) holds the key blocks that the i-th block of query rows
  // meets, from offsets[i] to offsets[i + 1] of `blocks`, each as 2 * index + (masked inside or not).
  const int32_t* offsets;
  const int32_t* blocks;
  int64_t list_batch_stride, list_head_stride;  // of `offsets`; 0 where lists are shared
  const float* key_bias;                        // added to the score of each key; may be null
  int64_t key_bias_batch_stride, key_bias_head_stride;
  // Of each head the products whose operands are rounded to bfloat16 (bits of Mode), where the library
  // knows of it and the machine multiplies it; null: none.
  const int32_t* modes;
  int64_t mode_batch_stride, mode_head_stride;
  // Of each head how far below its row's maximum a score is to be left out (find_skipped); null: none.
  const float* skip;
  int64_t skip_batch_stride, skip_head_stride;

  int64_t* skipped;  // [B, H], added to: how often a row has skipped a block of keys; may be null
  int64_t threads;
  uint64_t seed;  // of dropout

  // An audit: only these rows are computed, exactly, and compared with what `out` holds of them;
  // null: it is no audit. compared [B, H, 2] is added to: the sums over the rows of
  // |out - exact|^2 and |exact|^2.
  const int64_t* places;
  int64_t place_count;
  double* compared;

  // Whether `out` and `lse` hold what other keys gave, to which these keys' part is joined; log_count is
  // then added to all of its scores.
  int64_t joins;
  double log_count;
};

enum Mode : int32_t { kScoresInBfloat16 = 1, kValuesInBfloat16 = 2 };

// Where the gradient of an operand goes: float64, a copy for each thread, or float32, one for all of
// them (copy_stride 0) that is added to atomically.
struct OperandGradient {
  void* data;  // null where nobody asks for it
  int64_t copy_stride;
  int64_t stride[4];
};

// An entry of the block lists: which block, and whether the mask cuts it.
static inline int64_t block_of(int32_t entry) { return entry >> 1; }
static inline bool is_cut(int32_t entry) { return entry & 1; }

// The place of the n-th of [batch, heads, blocks] items.
struct Place {
  int64_t batch, head, block;
};

static inline Place place_of(int64_t n, int64_t heads, int64_t blocks) {
  return {n / blocks / heads, n / blocks % heads, n % blocks};
}

struct BackwardCall {
  Call call;  // `out` and `statistics` are read
  Tensor grad_out, grad_q, grad_k, grad_v;
  const OperandGradient* gradients;  // one for each operand; null where nobody asks for any
};

static_assert(sizeof(Call) == 45 * 8 && sizeof(BackwardCall) == (45 + 17) * 8 &&
                  sizeof(Operand) == 5 * 8 && sizeof(OperandGradient) == 6 * 8,
              "all members are of 64 bits");

enum Status : int64_t { kDone = 0, kNotFinite = 1, kNoMemory = 2 };

// What a row yields that attends to no key.
enum class EmptyRow { kZero, kNaN, kUniform };
