// What every native op needs: memory aligned to cache lines, and work shared between threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Zeroed memory aligned to a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(nullptr) {
    const size_t bytes = static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * sizeof(T), 64));
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

// work(item, state of its thread) for every item, on up to `threads` threads. Exceptions (memory) are the caller's.
template <typename State, typename Make, typename Work>
bool share(int64_t items, int64_t threads, Make make, Work work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto run = [&] {
    try {
      State state = make();
      for (int64_t item; !failed && (item = next++) < items;) work(item, state);
    } catch (...) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, items); ++i) others.emplace_back(run);
  } catch (...) {  // no thread to be had: fewer will do
  }
  run();
  for (std::thread& other : others) other.join();
  return !failed;
}
