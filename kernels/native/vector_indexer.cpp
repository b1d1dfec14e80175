// lightning_indexer on vectors: scores in float32, exact top-k, ties to the lowest slot, slots ascending.
//
// Keys lie side by side in the lanes, so that the sum over heads is a sum of registers. Products of bfloat16 are exact in
// float32: no score has to be looked at twice. How the best are chosen: select.h. A score is the same whichever thread makes it.
#include "select.h"

namespace {

constexpr int64_t VECTORS = 2;                  // of keys, and
constexpr int64_t HEADS = LANES == 16 ? 8 : 4;  // heads, multiplied at once: their products stay in registers
constexpr int64_t KEYS = VECTORS * LANES;       // packed at once, then shown to all queries of the tile
constexpr int64_t QUERIES = 64;                 // of a tile at most

template <typename T>
struct Problem {
  const T *q, *k;
  const float* weights;
  const int64_t *begin, *end;  // within 0..slots
  int32_t* out;
  int64_t tokens, slots, heads, width, selected, rows;  // rows: queries of a tile
  int64_t units() const { return round_up(width, in_unit<T>) / in_unit<T>; }
  int64_t padded_units() const { return round_up(units(), LANES); }  // of a packed key: whole squares are transposed
  int64_t tiles() const { return (tokens + rows - 1) / rows; }  // of a sequence
  int64_t padded_heads() const { return round_up(heads, HEADS); }
  int64_t span() const { return round_up(slots, KEYS) + KEYS; }
};

template <typename T>
struct Scratch {
  Scratch(const Problem<T>& p, int64_t queries_held)
      : queries(p.rows * p.padded_heads() * p.units()), rows(KEYS * p.padded_units()), keys(KEYS * p.padded_units()),
        scores(queries_held * p.span()), candidates(queries_held > 0 ? p.span() : 0) {}
  Buffer<unit> queries, rows, keys;
  Buffer<float> scores;
  Buffer<int32_t> candidates;
};

// `count` keys unit by unit: [units, KEYS]; keys that are not there are 0. From where they lie if whole squares fit, else from
// a copy. The keys after them come into the cache meanwhile: a single query is done before memory would have brought them.
template <typename T>
void pack_keys(const Problem<T>& p, const T* k, int64_t count, Scratch<T>& s) {
  const int64_t units = p.padded_units();
  const unit* from = reinterpret_cast<const unit*>(k);
  if (count < KEYS || units * in_unit<T> != p.width || !(std::is_same<T, float>::value || paired<T>)) {
    from = s.rows.get();
    for (int64_t i = 0; i < KEYS; ++i) copy_row(k + i * p.width, i < count ? p.width : 0, s.rows.get() + i * units, units);
  }
  for (int64_t v = 0; v < KEYS; v += LANES)
    for (int64_t u = 0; u < units; u += LANES) {
      const unit* square = from + v * units + u;
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) __builtin_prefetch(square + (KEYS + i) * units);
      turn(square, units, s.keys.get() + u * KEYS + v, KEYS);
    }
}

// sum [VECTORS] += weights x ReLU(q . k) of up to HEADS heads; NaN for NaN.
template <bool PAIR>
void add_heads(const unit* q, int64_t units, const float* weights, int64_t heads, const unit* keys, floats* sum) {
  floats dot[HEADS][VECTORS];
#pragma GCC unroll 8
  for (int64_t h = 0; h < HEADS; ++h)
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) dot[h][j] = floats{};
  for (int64_t u = 0; u < units; ++u) {
    floats k[VECTORS];
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) k[j] = load(keys + u * KEYS + j * LANES);
#pragma GCC unroll 8
    for (int64_t h = 0; h < HEADS; ++h) {
      const floats one = everywhere<PAIR>(q + h * units + u);
#pragma GCC unroll 2
      for (int64_t j = 0; j < VECTORS; ++j) dot[h][j] = add_product<PAIR>(dot[h][j], one, k[j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t h = 0; h < HEADS; ++h) {
    if (h >= heads) break;  // a head that is not there adds nothing: 0 times an infinite key would be NaN
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) sum[j] += (dot[h][j] < 0.0f ? floats{} : dot[h][j]) * weights[h];
  }
}

// Scores of KEYS keys for one query.
template <typename T>
void score(const Problem<T>& p, const unit* q, const float* weights, const unit* keys, float* scores) {
  floats sum[VECTORS] = {};
  for (int64_t h = 0; h < p.heads; h += HEADS)
    add_heads<paired<T>>(q + h * p.units(), p.units(), weights + h, p.heads - h, keys, sum);
  for (int64_t j = 0; j < VECTORS; ++j) store(scores + j * LANES, rankable(sum[j]));
}

// Scores [count, span] of queries token .. token + count for the keys from .. to of their sequence, where there is a choice.
template <typename T>
void score_tile(const Problem<T>& p, int64_t token, int64_t count, int64_t from, int64_t to, float* scores, Scratch<T>& s) {
  const int64_t *begin = p.begin + token, *end = p.end + token, stride = p.padded_heads() * p.units();
  const T* k = p.k + token / p.tokens * p.slots * p.width;
  int64_t low = to, high = from;
  for (int64_t t = 0; t < count; ++t) {
    if (end[t] - begin[t] <= p.selected) continue;
    low = std::min(low, std::max(from, begin[t])), high = std::max(high, std::min(to, end[t]));
    for (int64_t h = 0; h < p.heads; ++h)
      copy_row(p.q + ((token + t) * p.heads + h) * p.width, p.width, s.queries.get() + t * stride + h * p.units(), p.units());
  }
  for (int64_t i = low / KEYS * KEYS; low < high && i < high; i += KEYS) {
    pack_keys(p, k + i * p.width, std::min(KEYS, p.slots - i), s);
    for (int64_t t = 0; t < count; ++t)
      if (end[t] - begin[t] > p.selected && begin[t] < i + KEYS && i < end[t])
        score(p, s.queries.get() + t * stride, p.weights + (token + t) * p.heads, s.keys.get(), scores + t * p.span() + i);
  }
}

template <typename T>
void choose(const Problem<T>& p, int64_t token, const float* scores, int32_t* candidates) {
  const int64_t begin = p.begin[token], seen = std::max<int64_t>(0, p.end[token] - begin);
  int32_t* out = p.out + token * p.selected;
  if (seen > p.selected) return select(scores + begin, seen, p.selected, begin, candidates, out);
  for (int64_t i = 0; i < p.selected; ++i) out[i] = i < seen ? static_cast<int32_t>(begin + i) : -1;
}

template <typename T>
bool run_tiles(const Problem<T>& p, int64_t batch, int64_t threads) {
  return share<Scratch<T>>(batch * p.tiles(), threads, [&] { return Scratch<T>(p, p.rows); }, [&](int64_t item, Scratch<T>& s) {
    const int64_t first = item % p.tiles() * p.rows, token = item / p.tiles() * p.tokens + first;
    const int64_t count = std::min(p.rows, p.tokens - first);
    score_tile(p, token, count, 0, p.slots, s.scores.get(), s);
    for (int64_t t = 0; t < count; ++t) choose(p, token + t, s.scores.get() + t * p.span(), s.candidates.get());
  });
}

// Where there are fewer tiles than threads: parts of the keys, then the choices.
template <typename T>
bool run_parts(const Problem<T>& p, int64_t batch, int64_t threads) {
  const int64_t tiles = batch * p.tiles(), parts = (threads + tiles - 1) / tiles, keys = round_up((p.slots + parts - 1) / parts, KEYS);
  Buffer<float> scores(batch * p.tokens * p.span());
  return share<Scratch<T>>(tiles * parts, threads, [&] { return Scratch<T>(p, 0); }, [&](int64_t item, Scratch<T>& s) {
    const int64_t tile = item / parts, first = tile % p.tiles() * p.rows, token = tile / p.tiles() * p.tokens + first;
    const int64_t from = std::min(item % parts * keys, p.slots), to = std::min(from + keys, p.slots);
    score_tile(p, token, std::min(p.rows, p.tokens - first), from, to, scores.get() + token * p.span(), s);
  }) && share<Buffer<int32_t>>(batch * p.tokens, threads, [&] { return Buffer<int32_t>(p.span()); },
                               [&](int64_t token, Buffer<int32_t>& candidates) {
    choose(p, token, scores.get() + token * p.span(), candidates.get());
  });
}

template <typename T>
bool run(const T* q, const T* k, const float* weights, const int64_t* begin, const int64_t* end, int32_t* out, int64_t batch,
         int64_t tokens, int64_t slots, int64_t heads, int64_t width, int64_t selected, int64_t budget, int64_t threads) {
  const int64_t fit = budget / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, slots);
  const int64_t rows = std::max<int64_t>(1, std::min({QUERIES, tokens, fit}));
  const Problem<T> p{q, k, weights, begin, end, out, tokens, slots, heads, width, selected, rows};
  try {
    return batch * p.tiles() < threads ? run_parts(p, batch, threads) : run_tiles(p, batch, threads);
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace

// q [batch, tokens, heads, width], k [batch, slots, width], weights [batch, tokens, heads], begin and end [batch, tokens]
// within 0..slots, out [batch, tokens, selected]; budget: bytes of scores a thread may hold; false if memory ran out.
EXPORTED bool mla2dsa_lightning_indexer_bfloat16(const bf16* q, const bf16* k, const float* weights, const int64_t* begin,
                                                 const int64_t* end, int32_t* out, int64_t batch, int64_t tokens,
                                                 int64_t slots, int64_t heads, int64_t width, int64_t selected,
                                                 int64_t budget, int64_t threads) {
  return run(q, k, weights, begin, end, out, batch, tokens, slots, heads, width, selected, budget, threads);
}

EXPORTED bool mla2dsa_lightning_indexer_float32(const float* q, const float* k, const float* weights, const int64_t* begin,
                                                const int64_t* end, int32_t* out, int64_t batch, int64_t tokens,
                                                int64_t slots, int64_t heads, int64_t width, int64_t selected,
                                                int64_t budget, int64_t threads) {
  return run(q, k, weights, begin, end, out, batch, tokens, slots, heads, width, selected, budget, threads);
}
