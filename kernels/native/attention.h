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

#if defined(__AVX512BF16__)
// Two rows next to each other, channel by channel.
void interleave(const unit* const* row, int64_t pairs, int64_t channels, unit* values, const unit** value) {
  alignas(64) uint16_t order[2][32];
  for (uint16_t i = 0; i < 32; ++i) order[0][i] = (i & 1) * 32 + i / 2, order[1][i] = order[0][i] + 16;
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    unit* to = values + pair * (channels + LINE);  // or all pairs would fall on the same few places of the cache
    value[pair] = to;
    for (int64_t c = 0; c < channels; c += 32) {
      const __m512i x = (__m512i)load(row[2 * pair] + c / 2), y = (__m512i)load(row[2 * pair + 1] + c / 2);
      store(to + c, (floats)_mm512_permutex2var_epi16(x, first, y));
      store(to + c + 16, (floats)_mm512_permutex2var_epi16(x, second, y));
    }
  }
}
#endif

void rescale(float* sums, int64_t channels, const float* factor) {
  for (int64_t h = 0; h < HEADS; ++h)
    if (factor[h] != 1.0f)
      for (int64_t c = 0; c < channels; ++c) sums[h * channels + c] *= factor[h];
}

// sums [VALUE_HEADS, VECTORS of channels] += weights x values
template <bool PAIR>
void add_values(const unit* const* value, int64_t first, const unit* weights, int64_t units, float* sums, int64_t channels) {
  floats sum[VALUE_HEADS][VECTORS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < VALUE_HEADS; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) sum[i][j] = floats{};
  for (int64_t u = 0; u < units; ++u) {
    floats v[VECTORS];
#pragma GCC unroll 4
    for (int64_t j = 0; j < VECTORS; ++j) v[j] = load(value[u] + first + j * LANES);
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
      float* to = sums + i * channels + j * LANES;
      store(to, load(to) + sum[i][j]);
    }
}

}  // namespace
