// Vectors of the machine at hand, from the compiler's own vector types: 16 numbers with AVX-512, 8 with AVX2, 4 elsewhere
// (NEON, SSE2). What is compiled is decided by the flags of the compiler alone, so one source serves every processor.
//
// Operands are moved in units of four bytes: one float32, or two bfloat16 that lie next to each other where the processor
// multiplies them in pairs and adds both products in float32 (AVX512_BF16). The loops are the same for both.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "work.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

using bf16 = uint16_t;
using unit = float;  // or two bfloat16: moved as it is, never computed with
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
using lanes = std::make_integer_sequence<int, LANES>;

// Whether rows of T are multiplied in pairs. Where they are not, bfloat16 is widened first, which loses nothing.
template <typename T>
constexpr bool paired = PAIRS && std::is_same<T, bf16>::value;
template <typename T>
constexpr int64_t in_unit = paired<T> ? 2 : 1;

inline floats load(const unit* from) {
  floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

template <int... I>
floats repeated(float x, std::integer_sequence<int, I...>) {
  return floats{((void)I, x)...};
}

// A unit in every lane. Pairs go through integers: vdpbf16ps waits a cycle for what a float broadcast brought.
template <bool PAIR>
floats everywhere(const unit* from) {
#if defined(__AVX512F__)
  int32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  if constexpr (PAIR) return (floats)_mm512_set1_epi32(bits);
#endif
  float x;
  std::memcpy(&x, from, sizeof x);
  return repeated(x, lanes());
}

inline floats number(float x) { return repeated(x, lanes()); }

// sum + a * b; of both numbers in a unit if PAIR
template <bool PAIR>
floats add_product(floats sum, floats a, floats b) {
#if defined(__AVX512BF16__)
  if constexpr (PAIR) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  static_assert(!PAIR || PAIRS, "this processor multiplies no pairs");
  return sum + a * b;
}

// a and b alternating, from lane FIRST on
template <int FIRST, int... I>
floats zip(floats a, floats b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * static_cast<int>(LANES))...);
#else
  return __builtin_shuffle(a, b, ints{(FIRST + I / 2 + I % 2 * static_cast<int>(LANES))...});
#endif
}

// r[i][j] <-> r[j][i]: a riffle of the rows rotates the bits of (row, lane) by one; log2(LANES) of them swap the two.
inline void transpose(floats (&r)[LANES]) {
  constexpr int half = LANES / 2;
  floats t[LANES];
  for (int n = 1; n < LANES; n *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      t[2 * i] = zip<0>(r[i], r[i + half], lanes());
      t[2 * i + 1] = zip<half>(r[i], r[i + half], lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) r[i] = t[i];
  }
}

// LANES rows of LANES units become columns.
inline void turn(const unit* from, int64_t stride, unit* to, int64_t to_stride) {
  floats square[LANES];
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) square[i] = load(from + i * stride);
  transpose(square);
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) store(to + i * to_stride, square[i]);
}

// e^x of x <= 0 to the last bits, NaN for NaN; below 2^-126 it is 0. Cephes' reduction and polynomial.
inline floats exponential(floats x) {
  const ints gone = x < -87.3f;
  const floats n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to a whole number
  const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  floats p = number(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  p = p * r * r + (r + 1.0f);
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return gone ? floats{} : p * (floats)power;
}

inline float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline bf16 rounded(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<bf16>(x != x ? 0x7fc0 : nearest);
}

// A row of `width` numbers as units, zeros behind it up to `units` of them.
template <typename T>
void copy_row(const T* from, int64_t width, unit* to, int64_t units) {
  if constexpr (std::is_same<T, bf16>::value && !paired<T>) {
    for (int64_t c = 0; c < width; ++c) to[c] = widened(from[c]);
  } else {
    std::memcpy(to, from, width * sizeof(T));
  }
  std::memset(reinterpret_cast<char*>(to) + width * (4 / in_unit<T>), 0, units * 4 - width * (4 / in_unit<T>));
}

#if defined(__AVX512BF16__)
// Units of numbers of a and b, rounded to bfloat16.
inline floats pairs_of(floats a, floats b) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
  return (floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

// The first `count` numbers.
inline void store_some(floats x, int64_t count, float* to) {
  float all[LANES];
  if (count == LANES) return store(to, x);
  store(all, x);
  std::memcpy(to, all, count * sizeof(float));
}

inline void store_some(floats x, int64_t count, bf16* to) {
#if defined(__AVX512BF16__)
  const __mmask16 there = (1u << count) - 1;
  _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  float all[LANES];
  store(all, x);
  for (int64_t i = 0; i < count; ++i) to[i] = rounded(all[i]);
#endif
}
