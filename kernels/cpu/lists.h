// The block lists the other way round: for each block of keys, the blocks of query rows that meet it.

#pragma once

#include "memory.h"

struct Entries {
  const int32_t *from, *to;
  const int32_t* begin() const { return from; }
  const int32_t* end() const { return to; }
};

// Of the query heads that share one key head.
class RowLists {
 public:
  RowLists(const Call& call, int64_t row_blocks, int64_t key_blocks)
      : call_(call), row_blocks_(row_blocks), key_blocks_(key_blocks) {
    offsets_ = buffer_of<int64_t>(kGroup * (key_blocks + 1));
    entries_ = buffer_of<int32_t>(kGroup * row_blocks * key_blocks);
  }

  bool complete() const { return offsets_ && entries_; }

  // The rows' blocks, each as 2 * index + (masked inside or not).
  Entries of(int64_t head_in_group, int64_t key_block) const {
    const int64_t* offset = offsets_.get() + head_in_group * (key_blocks_ + 1) + key_block;
    const int32_t* entries = entries_.get() + head_in_group * row_blocks_ * key_blocks_;
    return {entries + offset[0], entries + offset[1]};
  }

  void fill(int64_t batch, int64_t kv_head) {
    for (int64_t i = 0; i < kGroup; ++i) fill_head(batch, kv_head * kGroup + i, i);
  }

 private:
  // Counting sort by the block of keys.
  void fill_head(int64_t batch, int64_t head, int64_t head_in_group) {
    int64_t* offset = offsets_.get() + head_in_group * (key_blocks_ + 1);
    int32_t* entries = entries_.get() + head_in_group * row_blocks_ * key_blocks_;
    const int32_t* list =
        call_.offsets + batch * call_.list_batch_stride + head * call_.list_head_stride;
    std::memset(offset, 0, sizeof(int64_t) * (key_blocks_ + 1));
    for (int64_t at = list[0]; at < list[row_blocks_]; ++at) ++offset[block_of(call_.blocks[at]) + 1];
    for (int64_t block = 0; block < key_blocks_; ++block) offset[block + 1] += offset[block];
    for (int64_t row = 0; row < row_blocks_; ++row)
      for (int64_t at = list[row]; at < list[row + 1]; ++at) {
        const int32_t entry = call_.blocks[at];
        entries[offset[block_of(entry)]++] = int32_t(2 * row + is_cut(entry));
      }
    for (int64_t block = key_blocks_; block > 0; --block) offset[block] = offset[block - 1];
    offset[0] = 0;
  }

  const Call& call_;
  int64_t row_blocks_, key_blocks_;
  Buffer<int64_t> offsets_;
  Buffer<int32_t> entries_;
};
