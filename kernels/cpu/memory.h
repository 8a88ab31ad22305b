// Memory of a call, and where the rows of its tensors are.

#pragma once

#include <cstdlib>
#include <memory>

#include "call.h"

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename Item>
using Buffer = std::unique_ptr<Item[], Free>;

// Room for `count` items (and 64 bytes, so that a vector may be read across the end), null where
// there is no memory.
template <typename Item>
static Buffer<Item> buffer_of(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(Item) + 127) / 64 * 64;
  return Buffer<Item>(static_cast<Item*>(std::aligned_alloc(64, bytes)));
}

static inline const Number* row_of(const Tensor& tensor, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const Number*>(tensor.data) + batch * tensor.batch_stride +
         head * tensor.head_stride + row * tensor.row_stride;
}
