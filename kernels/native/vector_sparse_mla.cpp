// sparse_mla on vectors: attention of each query over the key rows it selected, softmax and sums in float32.
//
// 16 heads lie side by side in the lanes, so that a key row is read a unit at a time, where it lies, and serves all heads:
// nothing is gathered. For the sums the lanes are channels of the rows. The softmax runs on, block by block.
//
// Neighbours that selected every key so far, as the first index_topk queries of a sequence do, go through its rows together:
// that is dense attention, with the same sums in the same order as each of them would have alone.
#include "vectors.h"

namespace {

constexpr int64_t HEADS = 16;                               // next to each other in the logits
constexpr int64_t ROWS = LANES == 16 ? 8 : 4;               // key rows multiplied at once: their sums stay in registers
constexpr int64_t VALUE_HEADS = LANES == 16 ? 8 : 4;        // heads and vectors of channels summed at once
constexpr int64_t VECTORS = LANES == 4 ? 4 : 2;
constexpr int64_t TOGETHER = 4;                             // tokens at most that go through the same rows together
constexpr int64_t LINE = 16;                                // units in a cache line
constexpr int64_t PART = 64;                                // units of a row summed at once
constexpr int64_t UNITS = 64;                               // units of a block in the sums: 64 rows, or 64 pairs of rows

template <typename T>
struct Problem {
  const T *q, *kv;
  const int32_t* indices;
  T* out;
  int64_t tokens, slots, heads, width, rank, selected;
  float scale;
  int64_t together;
  int64_t groups() const { return round_up(heads, HEADS) / HEADS; }
  int64_t units() const { return round_up(width, in_unit<T>) / in_unit<T>; }       // of a row
  int64_t padded_rank() const { return round_up(rank, VECTORS * LANES * in_unit<T>); }  // channels that are summed
  int64_t row_units() const { return std::max(units(), padded_rank() / in_unit<T>); }   // of a row that may be read
  // Whether rows can be read where they are: they are made of units, and reading padded_rank() stays within them.
  bool in_place() const {
    return (std::is_same<T, float>::value || paired<T>) && width % in_unit<T> == 0 && padded_rank() <= width;
  }
};

template <typename T>
struct Scratch {
  static constexpr int64_t BLOCK = UNITS * in_unit<T>;
  explicit Scratch(const Problem<T>& p)
      : slots(p.together * p.selected), rows(p.in_place() ? 0 : BLOCK * p.row_units()), nothing(p.row_units()),
        one(p.units()), values(paired<T> ? (UNITS + 1) * (p.padded_rank() + LINE) : 0),
        queries(p.together * p.groups() * p.units() * HEADS), logits(BLOCK * HEADS), weights(UNITS * HEADS),
        sums(p.together * p.groups() * HEADS * p.padded_rank()), largest(p.together * p.groups() * HEADS),
        total(p.together * p.groups() * HEADS), factor(HEADS) {}
  Buffer<int32_t> slots;
  Buffer<unit> rows, nothing, one, values, queries;
  Buffer<float> logits;
  Buffer<unit> weights;
  Buffer<float> sums, largest, total, factor;
  int64_t count[TOGETHER];  // of the slots of each token
  const unit *row[BLOCK + ROWS], *value[UNITS];  // of a block; ROWS more are fetched
};

template <typename T>
int64_t valid_slots(const Problem<T>& p, int64_t token, int32_t* slots) {
  const int32_t* all = p.indices + token * p.selected;
  int64_t count = 0;
  for (int64_t i = 0; i < p.selected; ++i) {
    slots[count] = all[i];
    count += all[i] >= 0 && all[i] < p.slots;
  }
  return count;
}

// Unit by unit the heads of a token: [groups, units, 16 heads]; heads that are not there are 0.
template <typename T>
void pack_queries(const Problem<T>& p, const T* q, unit* one, unit* to) {
  const int64_t units = p.units();
  std::memset(to, 0, p.groups() * units * HEADS * sizeof(unit));
  for (int64_t h = 0; h < p.heads; ++h) {
    copy_row(q + h * p.width, p.width, one, units);
    unit* place = to + h / HEADS * units * HEADS + h % HEADS;
    for (int64_t u = 0; u < units; ++u) std::memcpy(place + u * HEADS, one + u, sizeof(unit));
  }
}

// Where the rows of a block are: in the cache of the model, or in a copy; behind them rows of zeros, and what to fetch next.
template <typename T>
void find_rows(const Problem<T>& p, const T* kv, const int32_t* slots, int64_t count, int64_t beyond, Scratch<T>& s) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = kv + slots[i] * p.width;
    if (p.in_place()) {
      s.row[i] = reinterpret_cast<const unit*>(from);
    } else {
      unit* copy = s.rows.get() + i * p.row_units();
      copy_row(from, p.width, copy, p.row_units());
      s.row[i] = copy;
    }
  }
  for (int64_t i = count; i < s.BLOCK + ROWS; ++i) {
    const bool next = i >= s.BLOCK && i < count + beyond && p.in_place();
    s.row[i] = next ? reinterpret_cast<const unit*>(kv + slots[i] * p.width) : s.nothing.get();
  }
}

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

template <typename T>
void finish(const Problem<T>& p, const float* sums, const float* total, T* out) {
  for (int64_t h = 0; h < p.heads; ++h)
    for (int64_t c = 0; c < p.rank; ++c) convert(sums[h * p.padded_rank() + c] / total[h], out[h * p.rank + c]);
}

// The first `count` rows of a block, for 16 heads of a token: group g of all of the tile.
template <typename T>
void attend_rows(const Problem<T>& p, int64_t count, int64_t g, Scratch<T>& s) {
  constexpr bool pair = paired<T>;
  const int64_t channels = p.padded_rank(), padded = round_up(count, in_unit<T>), used = padded / in_unit<T>;
  float* sums = s.sums.get() + g * HEADS * channels;
  soften<pair>(p.scale, s.logits.get(), count, padded, s.weights.get(), s.largest.get() + g * HEADS,
               s.total.get() + g * HEADS, s.factor.get());
  rescale(sums, channels, s.factor.get());
  const unit* const* value = s.row;
#if defined(__AVX512BF16__)
  const unit* last = nullptr;
  if constexpr (pair) {
    value = s.value;
    last = s.value[used - 1];
    if (count < padded) {  // its neighbour in the pair may be a row of another token: 0 times NaN would be NaN
      const unit* alone[2] = {s.row[count - 1], s.nothing.get()};
      interleave(alone, 1, channels, s.values.get() + UNITS * (channels + LINE), s.value + used - 1);
    }
  }
#endif
  const int64_t heads = round_up(std::min(HEADS, p.heads - g % p.groups() * HEADS), VALUE_HEADS);
  for (int64_t c = 0; c < channels; c += VECTORS * LANES)
    for (int64_t h = 0; h < heads; h += VALUE_HEADS)
      add_values<pair>(value, c, s.weights.get() + h, used, sums + h * channels + c, channels);
#if defined(__AVX512BF16__)
  if constexpr (pair) s.value[used - 1] = last;
#endif
}

// Rows first .. first + count of a list of slots, for all heads of the tokens whose list reaches there.
template <typename T>
void attend_block(const Problem<T>& p, int64_t first, int64_t count, int64_t tokens, Scratch<T>& s) {
  bool interleaved = !paired<T>;
  for (int64_t g = 0; g < tokens * p.groups(); ++g) {
    const int64_t here = std::min(s.count[g / p.groups()] - first, count);
    for (int64_t i = 0; i < here; i += ROWS)
      multiply<paired<T>>(s.row + i, s.queries.get() + g * p.units() * HEADS, p.units(), s.logits.get() + i * HEADS);
#if defined(__AVX512BF16__)
    if (!interleaved) interleave(s.row, round_up(count, 2) / 2, p.padded_rank(), s.values.get(), s.value);
    interleaved = true;  // after the first products, which bring the rows into the cache
#endif
    if (here > 0) attend_rows(p, here, g, s);
  }
}

// Tokens token .. token + tokens of a sequence, whose lists of slots all begin as the longest one does.
template <typename T>
void attend(const Problem<T>& p, int64_t token, int64_t tokens, const int32_t* slots, Scratch<T>& s) {
  const int64_t groups = p.groups(), most = *std::max_element(s.count, s.count + tokens);
  const T* kv = p.kv + token / p.tokens * p.slots * p.width;
  for (int64_t t = 0; t < tokens; ++t)
    pack_queries(p, p.q + (token + t) * p.heads * p.width, s.one.get(), s.queries.get() + t * groups * p.units() * HEADS);
  std::fill_n(s.largest.get(), tokens * groups * HEADS, -INFINITY);
  std::fill_n(s.total.get(), tokens * groups * HEADS, 0.0f);
  std::fill_n(s.sums.get(), tokens * groups * HEADS * p.padded_rank(), 0.0f);
  for (int64_t first = 0; first < most; first += s.BLOCK) {
    const int64_t here = std::min(s.BLOCK, most - first);
    find_rows(p, kv, slots + first, here, most - first - here, s);
    attend_block(p, first, here, tokens, s);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    T* out = p.out + (token + t) * p.heads * p.rank;
    if (s.count[t] == 0)
      std::memset(out, 0, p.heads * p.rank * sizeof(T));
    else
      finish(p, s.sums.get() + t * groups * HEADS * p.padded_rank(), s.total.get() + t * groups * HEADS, out);
  }
}

// Up to TOGETHER tokens of a sequence: together if they can, else one after the other.
template <typename T>
void run_tile(const Problem<T>& p, int64_t token, int64_t tokens, Scratch<T>& s) {
  int64_t longest = 0, count[TOGETHER];
  const auto slots = [&](int64_t t) { return s.slots.get() + t * p.selected; };
  for (int64_t t = 0; t < tokens; ++t) {
    s.count[t] = count[t] = valid_slots(p, token + t, slots(t));
    if (count[t] > count[longest]) longest = t;
  }
  bool alike = true;
  for (int64_t t = 0; t < tokens; ++t) alike &= std::memcmp(slots(t), slots(longest), count[t] * sizeof(int32_t)) == 0;
  if (alike) return attend(p, token, tokens, slots(longest), s);
  for (int64_t t = 0; t < tokens; ++t) {
    s.count[0] = count[t];
    attend(p, token + t, 1, slots(t), s);
  }
}

template <typename T>
bool run(const T* q, const T* kv, const int32_t* indices, T* out, int64_t batch, int64_t tokens, int64_t slots,
         int64_t heads, int64_t width, int64_t rank, int64_t selected, float scale, int64_t threads) {
  // fewer where not all threads would have work, or what they hold would leave the cache
  const int64_t together = std::max<int64_t>(1, std::min({TOGETHER, batch * tokens / threads, TOGETHER * HEADS / heads}));
  const Problem<T> p{q, kv, indices, out, tokens, slots, heads, width, rank, selected, scale, together};
  const int64_t tiles = (tokens + together - 1) / together;
  return share<Scratch<T>>(batch * tiles, threads, [&] { return Scratch<T>(p); }, [&](int64_t item, Scratch<T>& s) {
    const int64_t first = item % tiles * together;
    run_tile(p, item / tiles * tokens + first, std::min(together, tokens - first), s);
  });
}

}  // namespace

// q [batch, tokens, heads, width], kv [batch, slots, width], indices [batch, tokens, selected], out [batch, tokens, heads,
// rank]; false if memory ran out.
EXPORTED bool mla2dsa_sparse_mla_bfloat16(const bf16* q, const bf16* kv, const int32_t* indices, bf16* out, int64_t batch,
                                          int64_t tokens, int64_t slots, int64_t heads, int64_t width, int64_t rank,
                                          int64_t selected, float scale, int64_t threads) {
  return run(q, kv, indices, out, batch, tokens, slots, heads, width, rank, selected, scale, threads);
}

EXPORTED bool mla2dsa_sparse_mla_float32(const float* q, const float* kv, const int32_t* indices, float* out, int64_t batch,
                                         int64_t tokens, int64_t slots, int64_t heads, int64_t width, int64_t rank,
                                         int64_t selected, float scale, int64_t threads) {
  return run(q, kv, indices, out, batch, tokens, slots, heads, width, rank, selected, scale, threads);
}
