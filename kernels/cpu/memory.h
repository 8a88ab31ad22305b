// Memory of a call, and where the rows of its tensors are.

#pragma once

#include <cstdlib>
#include <utility>

#include "call.h"

// As std::unique_ptr, whose header takes a twentieth of a build.
template <typename Item>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(Item* items) : items_(items) {}
  Buffer(Buffer&& other) : items_(other.items_) { other.items_ = nullptr; }
  Buffer& operator=(Buffer&& other) {
    std::swap(items_, other.items_);
    return *this;
  }
  ~Buffer() { std::free(items_); }

  Item* get() const { return items_; }
  Item& operator[](int64_t at) const { return items_[at]; }
  explicit operator bool() const { return items_; }

 private:
  Item* items_ = nullptr;
};

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
