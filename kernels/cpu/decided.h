// An attention whose heads are computed as decided or exactly, by flags; then some rows are audited,
// and what is too far off is computed exactly after all. In one call: between two of them the caller
// would take longer than the audit.
//
// Needs what forward.h needs. kernels/cpu/decided.py says what it is for, and does the same in steps
// where blocks are chosen in the call.

#pragma once

#include "attention.h"

// Columns of a state (runtime/state.py), a row for each head.
enum StateColumn {
  kCalls, kAsDecided, kLeftEnvelope, kFailedAudit, kAudits, kWrong, kWhole, kWorst, kDemoted,
  kSquare, kStateColumns
};

// Flags: what a head of a batch item does in a call.
constexpr int32_t kDecidedFlag = 1, kOutsideFlag = 0, kOffFlag = -1;

// Weight of what was before in the moving averages; as many audits count in them as in a plain mean of
// so many; audits before a head may be demoted; standard errors by which it must be over its budget.
constexpr double kKeep = 0.98, kMostCounted = (1 + kKeep) / (1 - kKeep), kLeastAudits = 16, kSure = 2;
constexpr double kLeastSum = 1e-200;  // so that nothing is divided by 0
// The query heads of a key head are audited in one of so many calls, those of others in others.
constexpr int64_t kTurns = 8;

// All members of 64 bits; kernels/cpu/call.py fills it.
struct DecidedCall {
  Call call;             // its plan: all heads as decided, offsets [1, H, row blocks + 1]
  const int32_t* flags;  // [B, H]
  const int32_t* exact;  // [row blocks + 1], offsets of an exact head, places in call.blocks, too
  const double *limits, *budgets;  // [H], relative errors: of one call, of the average
  double* state;                   // [H, kStateColumns]
  int64_t audited_rows, masked;    // masked: whether the mask leaves anything out
  int64_t may_be_empty;            // whether a row may be without a key as decided that has one
};

static_assert(sizeof(DecidedCall) == sizeof(Call) + 8 * 8, "all members are of 64 bits");

class Decided {
 public:
  explicit Decided(const DecidedCall& given)
      : given_(given),
        call_(given.call),
        items_(call_.batch * call_.heads),
        ends_((call_.rows + kBlockRows - 1) / kBlockRows + 1),
        flags_(buffer_of<int32_t>(items_)),
        sums_(buffer_of<double>(2 * items_)),
        audited_(buffer_of<bool>(items_)),
        offsets_(buffer_of<int32_t>(items_ * ends_)),
        modes_(buffer_of<int32_t>(items_)),
        skip_(buffer_of<float>(items_)),
        lse_(buffer_of<float>(given.may_be_empty ? items_ * call_.rows : 0)) {}

  Status run() {
    if (!flags_ || !sums_ || !audited_ || !offsets_ || !modes_ || !skip_ || !lse_) return kNoMemory;
    std::memcpy(flags_.get(), given_.flags, sizeof(int32_t) * items_);
    bool tried = false;
    for (int64_t i = 0; i < items_; ++i) tried |= flags_[i] == kDecidedFlag;
    Status status = compute();
    if (status != kDone) return status;
    bool off = given_.may_be_empty && tried && leaves_rows_empty();
    std::memset(audited_.get(), 0, sizeof(bool) * items_);
    if (tried && !off && given_.audited_rows > 0) {
      status = audit(false);
      // Where one head is off, the others may be: those whose turn it is not are looked at, too.
      off = status == kDone ? judge() : status == kNotFinite;
      if (off && status == kDone) status = audit(true);
      if (status == kNoMemory) return status;
      if (off) judge();
      if (status == kNotFinite) doubt_all();
    }
    if (off) status = compute();
    if (status == kNoMemory) return status;
    note();
    return kDone;
  }

 private:
  // The call by the present flags.
  Status compute() {
    Call call = call_;
    if (given_.may_be_empty) call.lse = lse_.get();
    bool all = true;
    for (int64_t i = 0; i < items_; ++i) all &= flags_[i] == kDecidedFlag;
    if (!all) choose(call);
    return attention(call);
  }

  // Lists, precision and thresholds of each head, in place of those of all heads as decided.
  void choose(Call& call) {
    for (int64_t i = 0; i < items_; ++i) {
      const int64_t head = i % call.heads;
      const bool decided = flags_[i] == kDecidedFlag;
      const int32_t* lists = decided ? call.offsets + head * call.list_head_stride : given_.exact;
      std::memcpy(offsets_.get() + i * ends_, lists, sizeof(int32_t) * ends_);
      modes_[i] = decided && call.modes ? call.modes[head * call.mode_head_stride] : 0;
      skip_[i] = decided && call.skip ? call.skip[head * call.skip_head_stride] : kInfinity;
    }
    if (call.skip)
      call.skip = skip_.get(), call.skip_batch_stride = call.heads, call.skip_head_stride = 1;
    if (call.modes)
      call.modes = modes_.get(), call.mode_batch_stride = call.heads, call.mode_head_stride = 1;
    call.offsets = offsets_.get();
    call.list_batch_stride = call.heads * ends_, call.list_head_stride = ends_;
  }

  // Whether a row has no key; then nothing stays as decided.
  bool leaves_rows_empty() {
    bool empty = false;
    for (int64_t i = 0; i < items_ * call_.rows; ++i) empty |= lse_[i] == -kInfinity;
    for (int64_t i = 0; empty && i < items_; ++i)
      if (flags_[i] == kDecidedFlag) flags_[i] = kOffFlag;
    return empty;
  }

  // One row of each of so many equal parts, another one with each call (kernels/audit.py).
  int64_t row_of_part(int64_t part, int64_t parts) const {
    double share = given_.state[kCalls] * 0.6180339887498949;
    share -= floor_of(share);
    return int64_t((double(part) + share) * double(call_.rows) / double(parts));
  }

  // Whose turn it is, of the key heads.
  bool is_turn_of(int64_t kv_head) const {
    return (int64_t(given_.state[kCalls]) / call_.batch + kv_head) % kTurns == 0;
  }

  // The heads whose turn it is, or all others.
  Status audit(bool others) {
    const int64_t blocks = (call_.columns + kBlockKeys - 1) / kBlockKeys;
    auto every = buffer_of<int32_t>(blocks);
    auto ends = buffer_of<int32_t>(2 * call_.heads);
    if (!every || !ends) return kNoMemory;
    for (int64_t i = 0; i < blocks; ++i) every[i] = int32_t(2 * i + given_.masked);
    for (int64_t head = 0; head < call_.heads; ++head) {
      const bool its = is_turn_of(head / kGroup) != others;
      ends[2 * head] = 0, ends[2 * head + 1] = its ? int32_t(blocks) : 0;
      for (int64_t i = head; its && i < items_; i += call_.heads)
        audited_[i] = given_.flags[i] == kDecidedFlag;
    }
    Call call = call_;
    call.offsets = ends.get(), call.blocks = every.get(), call.list_batch_stride = 0;
    call.list_head_stride = 2, call.key_bias = nullptr;
    if (!others) std::memset(sums_.get(), 0, sizeof(double) * 2 * items_);
    call.compared = sums_.get();
    const int64_t parts = given_.audited_rows < call.rows ? given_.audited_rows : call.rows;
    Status status = kDone;
    for (int64_t first = 0; first < parts && status == kDone; first += kFewRows) {
      int64_t places[kFewRows];
      call.places = places;
      call.place_count = parts - first < kFewRows ? parts - first : kFewRows;
      for (int64_t i = 0; i < call.place_count; ++i) places[i] = row_of_part(first + i, parts);
      status = attention(call);
    }
    return status;
  }

  static double error_of(double wrong, double whole) {
    return root_of(wrong / (whole < kLeastSum ? kLeastSum : whole));
  }

  // Whether a head that was audited is off, as its flag says from now on.
  bool judge() {
    bool off = false;
    for (int64_t i = 0; i < items_; ++i) {
      if (!audited_[i] || flags_[i] != kDecidedFlag) continue;
      if (error_of(sums_[2 * i], sums_[2 * i + 1]) <= given_.limits[i % call_.heads]) continue;
      flags_[i] = kOffFlag;
      off = true;
    }
    return off;
  }

  // Something is not finite: all are off, and nothing was seen of their errors.
  void doubt_all() {
    for (int64_t i = 0; i < items_; ++i) {
      if (flags_[i] == kDecidedFlag) flags_[i] = kOffFlag;
      audited_[i] = false;
    }
  }

  // Counts, moving averages, demotions. Errors count of what was as decided at first.
  void note() {
#pragma omp critical(adaattn_note)
    for (int64_t head = 0; head < call_.heads; ++head) {
      double* state = given_.state + head * kStateColumns;
      double wrong = 0, whole = 0;
      bool tried = false;
      for (int64_t i = head; i < items_; i += call_.heads) {
        state[kCalls] += 1;
        state[kAsDecided] += flags_[i] == kDecidedFlag;
        state[kLeftEnvelope] += flags_[i] == kOutsideFlag;
        state[kFailedAudit] += flags_[i] == kOffFlag;
        if (!audited_[i]) continue;
        wrong += sums_[2 * i], whole += sums_[2 * i + 1], tried = true;
      }
      if (tried) average(state, wrong, whole, given_.budgets[head]);
    }
  }

  static void average(double* state, double wrong, double whole, double budget) {
    // The plain mean until that would change less than the moving average does.
    const double mean = state[kAudits] / (state[kAudits] + 1);
    const double keep = mean < kKeep ? mean : kKeep, error = error_of(wrong, whole);
    state[kWrong] = keep * state[kWrong] + (1 - keep) * wrong;
    state[kWhole] = keep * state[kWhole] + (1 - keep) * whole;
    state[kSquare] = keep * state[kSquare] + (1 - keep) * wrong * wrong;
    state[kAudits] += 1;
    if (error > state[kWorst]) state[kWorst] = error;
    if (state[kAudits] >= kLeastAudits && !(error_of(surely_wrong(state), state[kWhole]) <= budget))
      state[kDemoted] = 1;
  }

  // What the average of the errors is at least, as far as so few rows can tell: some rows are far
  // off in most heads, and an average of few audits is of whether it met one.
  static double surely_wrong(const double* state) {
    const double counted = state[kAudits] < kMostCounted ? state[kAudits] : kMostCounted;
    const double variance = state[kSquare] - state[kWrong] * state[kWrong];
    const double least = state[kWrong] - kSure * root_of((variance > 0 ? variance : 0) / counted);
    return least < 0 ? 0 : least;
  }

  const DecidedCall& given_;
  const Call& call_;
  int64_t items_, ends_;
  Buffer<int32_t> flags_;
  Buffer<double> sums_;
  Buffer<bool> audited_;
  Buffer<int32_t> offsets_, modes_;
  Buffer<float> skip_, lse_;
};
