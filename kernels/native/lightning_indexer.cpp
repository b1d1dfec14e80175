// lightning_indexer of bfloat16 on AMX tiles: scores in float32, exact top-k, ties to the lowest slot, slots ascending.
//
// Heads of queries are the rows of a tile and keys its columns, so that the sum over heads is a sum of registers. Products
// of bfloat16 are exact in float32: no score has to be looked at twice. The k-th best is found by halving the interval of
// keys (ordered as integers) that holds it, on ever fewer candidates.
#include "amx.h"

namespace {

constexpr int64_t KEYS = 256;       // keys packed at once, then shown to all queries of the tile
constexpr int64_t QUERIES = 64;     // of a tile at most
constexpr int64_t NARROW = 4;       // halvings between two looks for candidates that are out

struct Problem {
  const bf16 *q, *k;
  const float* weights;
  const int64_t *begin, *end;  // within 0..slots
  int32_t* out;
  int64_t tokens, slots, heads, width, selected, rows;  // rows: queries of a tile
  int64_t padded_width() const { return round_up(width, CHANNELS); }
  int64_t together() const { return std::max<int64_t>(1, ROWS / heads); }  // queries in one tile of heads
  int64_t tiles() const { return round_up(heads, ROWS) / ROWS; }           // tiles of heads of one query
  int64_t tiles_of(int64_t queries) const { return (queries + together() - 1) / together() * tiles(); }
  int64_t span() const { return round_up(slots, ROWS) + ROWS; }
};

struct Scratch {
  explicit Scratch(const Problem& p)
      : queries(p.tiles_of(p.rows) * ROWS * p.padded_width()), keys(KEYS * p.padded_width()), products(TILE),
        scores(p.rows * p.span()), candidates(p.span()) {}
  Tiles tiles;
  Buffer<bf16> queries, keys;
  Buffer<float> products, scores;
  Buffer<int32_t> candidates;
};

// The heads of `count` queries as left operands: [tiles, 16 heads, width].
void pack_queries(const Problem& p, const bf16* q, int64_t count, bf16* to) {
  const int64_t width = p.padded_width(), tile = ROWS * width;
  std::memset(to, 0, p.tiles_of(count) * tile * sizeof(bf16));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t row = p.together() > 1 ? t * p.heads + h - t / p.together() * (p.together() * p.heads) : h % ROWS;
      const int64_t which = t / p.together() * p.tiles() + h / ROWS;
      std::memcpy(to + which * tile + row * width, q + (t * p.heads + h) * p.width, p.width * sizeof(bf16));
    }
}

// products [16 heads, 16 keys] of one tile of heads with one of keys
void multiply(const Problem& p, const bf16* queries, const bf16* keys, float* products) {
  const int64_t width = p.padded_width();
  _tile_zero(0);
  for (int64_t c = 0; c < width; c += CHANNELS) {
    _tile_loadd(1, queries + c, width * sizeof(bf16));
    _tile_loadd(2, keys + c * ROWS, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, products, 64);
}

// NaN and -inf rank last, but above what does not compete; -0 is 0.
__m512 rankable(__m512 x) {
  const __mmask16 low = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
  return _mm512_add_ps(_mm512_mask_mov_ps(x, low, _mm512_set1_ps(-3.4028234663852886e38f)), _mm512_setzero_ps());
}

// Scores of 16 keys for the queries of one tile: sum_h w_h ReLU(q_h . k), NaN for NaN.
void score(const Problem& p, const bf16* queries, const float* weights, int64_t count, const bf16* keys, float* products,
           float* scores) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 sum = zero;
  for (int64_t tile = 0; tile < p.tiles(); ++tile) {
    multiply(p, queries + tile * ROWS * p.padded_width(), keys, products);
    const int64_t heads = std::min(ROWS, p.heads - tile * ROWS);
    for (int64_t t = 0; t < count; ++t) {
      if (p.tiles() == 1) sum = zero;
      for (int64_t h = 0; h < heads; ++h) {
        const __m512 part = _mm512_max_ps(zero, _mm512_load_ps(products + (t * heads + h) * ROWS));  // second if NaN
        sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[t * p.heads + tile * ROWS + h]), part, sum);
      }
      if (tile + 1 == p.tiles()) _mm512_storeu_ps(scores + t * p.span(), rankable(sum));
    }
  }
}

// Order of floats without NaN and -0 as integers, there and back.
__m512i ordered(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}

int64_t count_from(const int32_t* keys, int64_t count, int32_t bound) {
  const __m512i limit = _mm512_set1_epi32(bound);
  int64_t found = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) found += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys + i), limit));
  for (; i < count; ++i) found += keys[i] >= bound;
  return found;
}

// The wanted-th largest of `count` keys; the keys are not kept.
int32_t threshold(int32_t* keys, int64_t count, int64_t wanted) {
  int64_t low = *std::min_element(keys, keys + count), high = *std::max_element(keys, keys + count);
  for (int64_t step = 1; low < high; ++step) {
    const int64_t middle = low + (high - low + 1) / 2;
    const int64_t reached = count_from(keys, count, static_cast<int32_t>(middle));
    if (reached >= wanted) low = middle; else high = middle - 1;
    if (step % NARROW != 0 || count < 64) continue;
    int64_t kept = 0, above = 0;
    const __m512i least = _mm512_set1_epi32(static_cast<int32_t>(low)), most = _mm512_set1_epi32(static_cast<int32_t>(high));
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 there = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
      const __m512i x = _mm512_maskz_loadu_epi32(there, keys + i);
      const __mmask16 over = _mm512_mask_cmpgt_epi32_mask(there, x, most);
      const __mmask16 inside = _mm512_mask_cmpge_epi32_mask(there & ~over, x, least);
      _mm512_mask_compressstoreu_epi32(keys + kept, inside, x);
      kept += __builtin_popcount(inside);
      above += __builtin_popcount(over);
    }
    count = kept;
    wanted -= above;
  }
  return static_cast<int32_t>(low);
}

// The `wanted` best of scores[0..count), as slots from `first` on.
void select(const float* scores, int64_t count, int64_t wanted, int64_t first, int32_t* keys, int32_t* out) {
  for (int64_t i = 0; i < count; i += 16) _mm512_storeu_si512(keys + i, ordered(_mm512_loadu_ps(scores + i)));
  const int32_t limit = threshold(keys, count, wanted);
  const __m512i bound = _mm512_set1_epi32(limit);
  int64_t over = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    over += __builtin_popcount(_mm512_mask_cmpgt_epi32_mask(there, ordered(_mm512_loadu_ps(scores + i)), bound));
  }
  int64_t ties = wanted - over, done = 0;
  for (int64_t i = 0; i < count && done < wanted; i += 16) {
    const __mmask16 there = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    const __m512i x = ordered(_mm512_loadu_ps(scores + i));
    uint32_t tied = _mm512_mask_cmpeq_epi32_mask(there, x, bound);
    while (__builtin_popcount(tied) > ties) tied ^= 1u << (31 - __builtin_clz(tied));
    ties -= __builtin_popcount(tied);
    const __mmask16 chosen = _mm512_mask_cmpgt_epi32_mask(there, x, bound) | static_cast<__mmask16>(tied);
    const __m512i slot = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first + i)),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm512_mask_compressstoreu_epi32(out + done, chosen, slot);
    done += __builtin_popcount(chosen);
  }
}

// Queries first .. first + count of a sequence.
void run(const Problem& p, int64_t batch, int64_t first, int64_t count, Scratch& s) {
  const int64_t token = batch * p.tokens + first, width = p.padded_width();
  const int64_t *begin = p.begin + token, *end = p.end + token;
  int64_t low = p.slots, high = 0;
  for (int64_t t = 0; t < count; ++t)
    if (end[t] - begin[t] > p.selected) low = std::min(low, begin[t]), high = std::max(high, end[t]);
  const bf16* k = p.k + batch * p.slots * p.width;
  if (low < high) pack_queries(p, p.q + token * p.heads * p.width, count, s.queries.get());
  for (int64_t from = low / ROWS * ROWS; from < high; from += KEYS) {
    const int64_t to = std::min(from + KEYS, high);
    for (int64_t i = from; i < to; i += ROWS)
      for (int64_t c = 0; c < width; c += CHANNELS)
        pack_right(k + i * p.width + c, p.width, std::min(ROWS, p.slots - i), p.width - c,
                   s.keys.get() + (i - from) * width + c * ROWS);
    for (int64_t t = 0; t < count; t += p.together()) {
      const int64_t several = std::min(p.together(), count - t);
      int64_t least = p.slots, most = 0;
      for (int64_t j = t; j < t + several; ++j)
        if (end[j] - begin[j] > p.selected) least = std::min(least, begin[j]), most = std::max(most, end[j]);
      for (int64_t i = std::max(from, least / ROWS * ROWS); i < std::min(to, most); i += ROWS)
        score(p, s.queries.get() + t / p.together() * p.tiles() * ROWS * width, p.weights + (token + t) * p.heads, several,
              s.keys.get() + (i - from) * width, s.products.get(), s.scores.get() + t * p.span() + i);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t seen = std::max<int64_t>(0, end[t] - begin[t]);
    int32_t* out = p.out + (token + t) * p.selected;
    if (seen > p.selected)
      select(s.scores.get() + t * p.span() + begin[t], seen, p.selected, begin[t], s.candidates.get(), out);
    else
      for (int64_t i = 0; i < p.selected; ++i) out[i] = i < seen ? static_cast<int32_t>(begin[t] + i) : -1;
  }
}

}  // namespace

// q [batch, tokens, heads, width], k [batch, slots, width], weights [batch, tokens, heads], begin and end [batch, tokens]
// within 0..slots, out [batch, tokens, selected]; budget: bytes of scores a thread may hold; false if memory ran out.
EXPORTED bool mla2dsa_lightning_indexer_bfloat16(const bf16* q, const bf16* k, const float* weights, const int64_t* begin,
                                                 const int64_t* end, int32_t* out, int64_t batch, int64_t tokens,
                                                 int64_t slots, int64_t heads, int64_t width, int64_t selected,
                                                 int64_t budget, int64_t threads) {
  const int64_t fit = budget / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(1, slots);
  const int64_t rows = std::max<int64_t>(1, std::min({QUERIES, tokens, fit}));
  const Problem p{q, k, weights, begin, end, out, tokens, slots, heads, width, selected, rows};
  const int64_t tiles = (tokens + rows - 1) / rows;
  return share<Scratch>(batch * tiles, threads, [&] { return Scratch(p); }, [&](int64_t item, Scratch& s) {
    const int64_t first = item % tiles * rows;
    run(p, item / tiles, first, std::min(rows, tokens - first), s);
  });
}
