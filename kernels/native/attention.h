// The products and sums of sparse_mla over a block of key rows, for 16 heads: rows x queries, the softmax as it runs on, and
// weights x values. The loops keep what they add up in registers.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t HEADS = 16;                         // next to each other in the logits
constexpr int64_t ROWS = LANES == 16 ? 8 : 4;         // key rows multiplied at once
constexpr int64_t VALUE_HEADS = LANES == 16 ? 8 : 4;  // heads, and
constexpr int64_t VECTORS = LANES == 4 ? 4 : 2;       // vectors of channels, summed at once
constexpr int64_t LINE = 16;                          // units in a cache line
constexpr int64_t PART = 64;                          // units of a row summed at once
constexpr int64_t UNITS = 64;                         // units of a block in the sums: 64 rows, or 64 pairs of rows

// logits [ROWS, 16 heads] of rows; the ROWS after them come into the cache meanwhile. Summed in parts, which are then added:
// the rounding of one long sum would be twice as far from the truth.
template <bool PAIR>
void multiply(const unit* const* row, const unit* queries, int64_t units, float* logits) {
  constexpr int64_t wide = HEADS / LANES;
  const unit* at[ROWS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; ++i) at[i] = row[i];
  for (int64_t part = 0; part < units; part += PART) {
    floats sum[ROWS][wide];
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < wide; ++j) sum[i][j] = floats{};
    const int64_t end = std::min(part + PART, units);
    for (int64_t line = part; line < end; line += LINE) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < ROWS; ++i) __builtin_prefetch(row[ROWS + i] + line);
      const int64_t stop = std::min(line + LINE, end);
#pragma GCC unroll 4
      for (int64_t u = line; u < stop; ++u) {
        floats q[wide];
#pragma GCC unroll 4
        for (int64_t j = 0; j < wide; ++j) q[j] = load(queries + u * HEADS + j * LANES);
#pragma GCC unroll 8
        for (int64_t i = 0; i < ROWS; ++i) {
          const floats k = everywhere<PAIR>(at[i] + u);
#pragma GCC unroll 4
          for (int64_t j = 0; j < wide; ++j) sum[i][j] = add_product<PAIR>(sum[i][j], k, q[j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < wide; ++j) {
        float* to = logits + i * HEADS + j * LANES;
        store(to, part > 0 ? load(to) + sum[i][j] : sum[i][j]);
      }
  }
}

// logits -> weights [units, 16 heads], and what earlier sums have to be multiplied with.
template <bool PAIR>
void soften(float scale, float* logits, int64_t count, int64_t padded, unit* weights, float* largest, float* total,
            float* factor) {
  for (int64_t h = 0; h < HEADS; h += LANES) {
    const floats before = load(largest + h);
    floats peak = before;
    for (int64_t i = 0; i < count; ++i) {
      const floats x = load(logits + i * HEADS + h) * scale;
      store(logits + i * HEADS + h, x);
      peak = x > peak ? x : peak;
    }
    const floats base = peak == -INFINITY ? floats{} : peak;  // no key above -inf yet: -inf - -inf would be NaN
    const floats change = exponential(before - base);
    floats sum = {};
    for (int64_t i = 0; i < count; ++i) {
      const floats weight = exponential(load(logits + i * HEADS + h) - base);
      sum += weight;
      store((PAIR ? logits : weights) + i * HEADS + h, weight);
    }
    for (int64_t i = count; i < padded; ++i) store((PAIR ? logits : weights) + i * HEADS + h, floats{});
#if defined(__AVX512BF16__)
    if constexpr (PAIR)
      for (int64_t u = 0; u < padded / 2; ++u)
        store(weights + u * HEADS, pairs_of(load(logits + 2 * u * HEADS), load(logits + (2 * u + 1) * HEADS)));
#endif
    store(largest + h, peak);
    store(total + h, load(total + h) * change + sum);
    store(factor + h, change);
  }
}

inline void rescale(float* sums, int64_t channels, const float* factor) {
  for (int64_t h = 0; h < HEADS; ++h)
    if (factor[h] != 1.0f)
      for (int64_t c = 0; c < channels; ++c) sums[h * channels + c] *= factor[h];
}

// VECTORS of values of unit u of the rows: one row, or each channel of two. Pairs are put together within quarters of a vector,
// which costs no detour across it: the sums hold channels 0..3, 8..11, 16..19, 24..27 and then the others of every 32.
template <bool PAIR>
void take_values(const unit* const* row, int64_t u, int64_t first, floats (&v)[VECTORS]) {
#if defined(__AVX512BF16__)
  if constexpr (PAIR) {
    const __m512i x = (__m512i)load(row[2 * u] + first / 2), y = (__m512i)load(row[2 * u + 1] + first / 2);
    v[0] = (floats)_mm512_unpacklo_epi16(x, y), v[1] = (floats)_mm512_unpackhi_epi16(x, y);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int64_t j = 0; j < VECTORS; ++j) v[j] = load(row[u] + first + j * LANES);
}

// VECTORS of sums in the order of the channels
template <bool PAIR>
void take_sums(const float* sums, floats (&v)[VECTORS]) {
#pragma GCC unroll 4
  for (int64_t j = 0; j < VECTORS; ++j) v[j] = load(sums + j * LANES);
#if defined(__AVX512BF16__)
  if constexpr (PAIR) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 x = (__m512)v[0], y = (__m512)v[1];
    v[0] = (floats)_mm512_permutex2var_ps(x, low, y), v[1] = (floats)_mm512_permutex2var_ps(x, high, y);
  }
#endif
}

// sums [VALUE_HEADS, VECTORS of channels] += weights x values, of channels `first` and on
template <bool PAIR>
void add_values(const unit* const* row, int64_t first, const unit* weights, int64_t units, float* sums, int64_t channels) {
  floats sum[VALUE_HEADS][VECTORS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < VALUE_HEADS; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) sum[i][j] = floats{};
  for (int64_t u = 0; u < units; ++u) {
    floats v[VECTORS];
    take_values<PAIR>(row, u, first, v);
#pragma GCC unroll 8
    for (int64_t i = 0; i < VALUE_HEADS; ++i) {
      const floats w = everywhere<PAIR>(weights + u * HEADS + i);
#pragma GCC unroll 4
      for (int64_t j = 0; j < VECTORS; ++j) sum[i][j] = add_product<PAIR>(sum[i][j], w, v[j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < VALUE_HEADS; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) {
      float* to = sums + i * channels + first + j * LANES;
      store(to, load(to) + sum[i][j]);
    }
}

}  // namespace
