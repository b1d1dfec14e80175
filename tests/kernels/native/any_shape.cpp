// Both ops on random shapes, numbers, lists of slots and counts of threads, for the sanitizers: what they compute is not looked
// at, but that no slot leaves the range. Argument: how many rounds.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

using bf16 = uint16_t;

#define DECLARE(name, T)                                                                                                  \
  extern "C" bool mla2dsa_sparse_mla_##name(const T*, const T*, const int32_t*, T*, int64_t, int64_t, int64_t, int64_t,   \
                                            int64_t, int64_t, int64_t, float, int64_t);                                   \
  extern "C" bool mla2dsa_lightning_indexer_##name(const T*, const T*, const float*, const int64_t*, const int64_t*,      \
                                                   int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                                   int64_t);
DECLARE(float32, float)
DECLARE(bfloat16, bf16)

std::mt19937 random_bits(1);

int64_t between(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(random_bits); }

// Exactly as long as the op may read: what lies behind belongs to the sanitizer.
template <typename T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> all(count);
  for (T& one : all) {
    const float x = std::normal_distribution<float>()(random_bits);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if constexpr (std::is_same<T, float>::value) one = x; else one = static_cast<bf16>(bits >> 16);
  }
  return all;
}

std::vector<int64_t> bounds(int64_t count, int64_t most) {
  std::vector<int64_t> all(count);
  for (int64_t& one : all) one = between(0, most);
  return all;
}

template <typename T>
bool sparse(int round, int64_t batch, int64_t tokens, int64_t slots, int64_t heads, int64_t threads) {
  const int64_t rank = round % 3 ? between(1, 90) : 64 * between(1, 4), width = rank + between(0, 70);
  const int64_t selected = between(0, round % 5 ? 150 : 1300);
  std::vector<int32_t> indices(batch * tokens * selected);
  const bool causal = between(0, 1);  // else anything, in range or not
  for (size_t i = 0; i < indices.size(); ++i) {
    const int64_t slot = i % selected, seen = std::min(slots, static_cast<int64_t>(i) / selected % tokens + 3);
    indices[i] = static_cast<int32_t>(causal ? (slot < seen ? slot : -1) : between(-3, slots + 2));
  }
  const auto q = numbers<T>(batch * tokens * heads * width), kv = numbers<T>(batch * slots * width);
  std::vector<T> out(batch * tokens * heads * rank);
  const auto op = [&] {
    if constexpr (std::is_same<T, float>::value) return mla2dsa_sparse_mla_float32; else return mla2dsa_sparse_mla_bfloat16;
  }();
  return op(q.data(), kv.data(), indices.data(), out.data(), batch, tokens, slots, heads, width, rank, selected, 0.1f, threads);
}

template <typename T>
bool indexer(int64_t batch, int64_t tokens, int64_t slots, int64_t heads, int64_t threads) {
  const int64_t width = between(1, 140), selected = between(1, slots), budget = between(0, 1) ? 1 : 1 << 20;
  const auto q = numbers<T>(batch * tokens * heads * width), k = numbers<T>(batch * slots * width);
  const auto weights = numbers<float>(batch * tokens * heads);
  const auto begin = bounds(batch * tokens, between(0, slots)), end = bounds(batch * tokens, slots);
  std::vector<int32_t> out(batch * tokens * selected);
  const auto op = [&] {
    if constexpr (std::is_same<T, float>::value) return mla2dsa_lightning_indexer_float32;
    else return mla2dsa_lightning_indexer_bfloat16;
  }();
  bool fine = op(q.data(), k.data(), weights.data(), begin.data(), end.data(), out.data(), batch, tokens, slots, heads, width,
                 selected, budget, threads);
  for (const int32_t slot : out) fine &= slot >= -1 && slot < slots;
  return fine;
}

int main(int, char** arguments) {
  bool fine = true;
  for (int round = 0; round < std::atoi(arguments[1]); ++round) {
    const int64_t batch = between(1, 2), tokens = between(1, round % 7 ? 9 : 70), slots = between(1, round % 5 ? 300 : 1400);
    const int64_t heads = between(1, round % 4 ? 9 : 40), threads = between(1, 5);
    fine &= sparse<float>(round, batch, tokens, slots, heads, threads) && sparse<bf16>(round, batch, tokens, slots, heads, threads);
    fine &= indexer<float>(batch, tokens, slots, heads, threads) && indexer<bf16>(batch, tokens, slots, heads, threads);
  }
  std::puts(fine ? "fine" : "wrong");
}
