// The best scores, exactly: ties to the lowest slot, slots ascending.
//
// Scores are ordered as integers. The wanted-th largest is found by halving the interval that holds it, on ever fewer
// candidates. Loops over plain integers are left to the compiler, which turns them into vectors.
#pragma once

#include "vectors.h"

namespace {

// NaN and -inf rank last, but above what does not compete; -0 is 0.
inline floats rankable(floats x) {
  const floats lowest = number(-3.4028234663852886e38f);
  x = x == x ? x : lowest;
  return (x < lowest ? lowest : x) + 0.0f;
}

// Order of floats without NaN and -0 as integers, there and back.
inline int32_t ordered(int32_t bits) { return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1); }

inline int64_t count_from(const int32_t* keys, int64_t count, int32_t bound) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += keys[i] >= bound;
  return found;
}

// Those of `count` keys in low..high go to the front; how many they are.
inline int64_t narrow(int32_t* keys, int64_t count, int32_t low, int32_t high) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i least = _mm512_set1_epi32(low), most = _mm512_set1_epi32(high);
  for (; i + 16 <= count; i += 16) {
    const __m512i x = _mm512_loadu_si512(keys + i);
    const __mmask16 inside = _mm512_cmpge_epi32_mask(x, least) & _mm512_cmple_epi32_mask(x, most);
    _mm512_storeu_si512(keys + kept, _mm512_maskz_compress_epi32(inside, x));  // into memory it is slow on AMD
    kept += __builtin_popcount(inside);
  }
#endif
  for (; i < count; ++i) {
    const int32_t x = keys[i];
    keys[kept] = x;
    kept += x >= low && x <= high;
  }
  return kept;
}

// The wanted-th largest of `count` keys, which are not kept.
inline int32_t threshold(int32_t* keys, int64_t count, int64_t wanted) {
  int32_t least = keys[0], most = keys[0];
  for (int64_t i = 1; i < count; ++i) least = std::min(least, keys[i]), most = std::max(most, keys[i]);
  int64_t low = least, high = most;
  int64_t from_low = count, above = 0;  // keys >= low, keys > high
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const int64_t reached = count_from(keys, count, static_cast<int32_t>(middle));
    if (reached >= wanted) low = middle, from_low = reached; else high = middle - 1, above = reached;
    if (from_low - above > count / 2) continue;
    count = narrow(keys, count, static_cast<int32_t>(low), static_cast<int32_t>(high));
    wanted -= above;
    from_low = count, above = 0;
  }
  return static_cast<int32_t>(low);
}

// The `wanted` best of scores[0..count), as slots from `first` on.
inline void select(const float* scores, int64_t count, int64_t wanted, int64_t first, int32_t* keys, int32_t* out) {
  const auto key = [&](int64_t i) {
    int32_t bits;
    std::memcpy(&bits, scores + i, sizeof bits);
    return ordered(bits);
  };
  for (int64_t i = 0; i < count; ++i) keys[i] = key(i);
  const int32_t limit = threshold(keys, count, wanted);
  int32_t over = 0;
  for (int64_t i = 0; i < count; ++i) over += key(i) > limit;
  int64_t ties = wanted - over, done = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i bound = _mm512_set1_epi32(limit);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= count && done + 16 <= wanted; i += 16) {
    const __m512i bits = _mm512_loadu_si512(scores + i);
    const __m512i x = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
    uint32_t tied = _mm512_cmpeq_epi32_mask(x, bound);
    while (__builtin_popcount(tied) > ties) tied ^= 1u << (31 - __builtin_clz(tied));
    ties -= __builtin_popcount(tied);
    const __mmask16 chosen = _mm512_cmpgt_epi32_mask(x, bound) | static_cast<__mmask16>(tied);
    const __m512i slot = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + i)), lane);
    _mm512_storeu_si512(out + done, _mm512_maskz_compress_epi32(chosen, slot));
    done += __builtin_popcount(chosen);
  }
#endif
  for (; i < count && done < wanted; ++i) {
    const int32_t x = key(i);
    const bool tied = x == limit && ties > 0;
    out[done] = static_cast<int32_t>(first + i);
    done += x > limit || tied;
    ties -= tied;
  }
}

}  // namespace
