// sparse_mla of bfloat16 on AMX tiles: attention of each query over the key rows it selected, softmax in float32.
//
// A block of selected rows is gathered into cache. As they lie they are the left operand of rows x queries; the same rows,
// interleaved in pairs, are the right operand of weights x values. The softmax runs on, block by block.
#include "amx.h"

namespace {

constexpr int64_t BLOCK = 256;  // rows gathered at once: they and their interleaved copy stay in the second-level cache
constexpr int64_t AHEAD = 12;   // rows fetched before they are copied

struct Problem {
  const bf16 *q, *kv;
  const int32_t* indices;
  bf16* out;
  int64_t tokens, slots, heads, width, rank, selected;
  float scale;
  int64_t groups() const { return round_up(heads, ROWS) / ROWS; }
  int64_t padded_width() const { return round_up(width, CHANNELS); }
  int64_t padded_rank() const { return round_up(rank, 4 * ROWS); }  // values are taken four tiles at a time
};

struct Scratch {
  explicit Scratch(const Problem& p)
      : slots(p.selected), rows(BLOCK * p.padded_width()), values(BLOCK * p.padded_rank()),
        queries(p.groups() * ROWS * p.padded_width()), logits(BLOCK * ROWS), weights(ROWS * BLOCK),
        sums(p.groups() * ROWS * p.padded_rank()), largest(p.groups() * ROWS), total(p.groups() * ROWS) {}
  Tiles tiles;
  Buffer<int32_t> slots;
  Buffer<bf16> rows, values, queries;
  Buffer<float> logits;
  Buffer<bf16> weights;
  Buffer<float> sums, largest, total;
};

int64_t valid_slots(const Problem& p, int64_t token, int32_t* slots) {
  const int32_t* all = p.indices + token * p.selected;
  int64_t count = 0;
  for (int64_t i = 0; i < p.selected; ++i) {
    slots[count] = all[i];
    count += all[i] >= 0 && all[i] < p.slots;
  }
  return count;
}

void fetch(const bf16* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 32) _mm_prefetch(reinterpret_cast<const char*>(row + c), _MM_HINT_T0);
}

// `count` key rows, one below the other; zero rows fill up to a multiple of 32.
void gather(const Problem& p, const bf16* kv, const int32_t* slots, int64_t count, bf16* rows) {
  const int64_t stride = p.padded_width();
  for (int64_t i = 0; i < std::min(count, AHEAD); ++i) fetch(kv + slots[i] * p.width, p.width);
  for (int64_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) fetch(kv + slots[i + AHEAD] * p.width, p.width);
    std::memcpy(rows + i * stride, kv + slots[i] * p.width, p.width * sizeof(bf16));
  }
  std::memset(rows + count * stride, 0, (round_up(count, CHANNELS) - count) * stride * sizeof(bf16));
}

// Two rows next to each other, channel by channel: tile t of a block of 32 rows holds channels 16 t .. 16 t + 15.
void interleave(const Problem& p, const bf16* rows, int64_t count, bf16* values) {
  alignas(64) uint16_t order[2][32];
  for (uint16_t i = 0; i < 32; ++i) order[0][i] = (i & 1) * 32 + i / 2, order[1][i] = order[0][i] + 16;
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
  const int64_t stride = p.padded_width(), tiles = p.padded_rank() / ROWS;
  for (int64_t pair = 0; pair < round_up(count, CHANNELS) / 2; ++pair) {
    const bf16 *a = rows + 2 * pair * stride, *b = a + stride;
    bf16* to = values + pair / ROWS * tiles * TILE + pair % ROWS * CHANNELS;
    for (int64_t c = 0; c < std::min(p.padded_rank(), stride); c += 32, to += 2 * TILE) {
      const __m512i x = _mm512_load_si512(a + c), y = _mm512_load_si512(b + c);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(x, first, y));
      _mm512_store_si512(to + TILE, _mm512_permutex2var_epi16(x, second, y));
    }
  }
}

// logits [rows, 16 heads]
void score(const Problem& p, const bf16* rows, int64_t count, const bf16* queries, float* logits) {
  const int64_t stride = p.padded_width();
  for (int64_t i = 0; i < count; i += 32) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < stride; c += CHANNELS) {
      _tile_loadd(4, queries + c * ROWS, 64);
      _tile_loadd(2, rows + i * stride + c, stride * sizeof(bf16));
      _tile_loadd(3, rows + (i + 16) * stride + c, stride * sizeof(bf16));
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, logits + i * ROWS, 64);
    _tile_stored(1, logits + (i + 16) * ROWS, 64);
  }
}

// logits -> weights [16 heads, BLOCK]; what earlier sums have to be multiplied with.
__m512 soften(const Problem& p, float* logits, int64_t count, bf16* weights, float* largest, float* total) {
  const __m512 scale = _mm512_set1_ps(p.scale), nothing = _mm512_set1_ps(-INFINITY);
  const __m512 before = _mm512_load_ps(largest);
  __m512 peak = before;
  for (int64_t i = 0; i < count; ++i) {
    const __m512 x = _mm512_mul_ps(_mm512_load_ps(logits + i * ROWS), scale);
    _mm512_store_ps(logits + i * ROWS, x);
    peak = _mm512_max_ps(peak, x);
  }
  // no key above -inf yet: -inf - -inf would be NaN
  const __m512 base = _mm512_mask_mov_ps(peak, _mm512_cmp_ps_mask(peak, nothing, _CMP_EQ_OQ), _mm512_setzero_ps());
  const __m512 factor = exponential(_mm512_sub_ps(before, base));
  __m512 sum = _mm512_mul_ps(_mm512_load_ps(total), factor);
  for (int64_t i = 0; i < round_up(count, CHANNELS); i += 16) {
    __m512i r[16];
    for (int64_t j = 0; j < 16; ++j) {
      const __m512 x = _mm512_load_ps(logits + (i + j) * ROWS);
      const __m512 weight = i + j < count ? exponential(_mm512_sub_ps(x, base)) : _mm512_setzero_ps();
      sum = _mm512_add_ps(sum, weight);
      r[j] = _mm512_castps_si512(weight);
    }
    transpose(r);
    for (int64_t h = 0; h < 16; ++h) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[h]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + h * BLOCK + i), rounded);
    }
  }
  _mm512_store_ps(largest, peak);
  _mm512_store_ps(total, sum);
  return factor;
}

void rescale(float* sums, int64_t stride, __m512 factor) {
  alignas(64) float each[16];
  _mm512_store_ps(each, factor);
  for (int64_t h = 0; h < 16; ++h) {
    if (each[h] == 1.0f) continue;
    for (int64_t c = 0; c < stride; c += 16) {
      float* at = sums + h * stride + c;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(each[h])));
    }
  }
}

// sums [16 heads, rank] += weights x values
void accumulate(const Problem& p, const bf16* weights, int64_t count, const bf16* values, float* sums) {
  const int64_t stride = p.padded_rank(), tiles = stride / ROWS, bytes = stride * sizeof(float);
  for (int64_t t = 0; t < tiles; t += 4) {
    float* at = sums + t * ROWS;
    _tile_loadd(0, at, bytes);
    _tile_loadd(1, at + 16, bytes);
    _tile_loadd(2, at + 32, bytes);
    _tile_loadd(3, at + 48, bytes);
    for (int64_t i = 0; i < count; i += CHANNELS) {
      const bf16* block = values + (i / CHANNELS * tiles + t) * TILE;
      _tile_loadd(4, weights + i, BLOCK * sizeof(bf16));
      _tile_loadd(5, block, 64);
      _tile_loadd(6, block + TILE, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, block + 2 * TILE, 64);
      _tile_loadd(6, block + 3 * TILE, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, at, bytes);
    _tile_stored(1, at + 16, bytes);
    _tile_stored(2, at + 32, bytes);
    _tile_stored(3, at + 48, bytes);
  }
}

void finish(const Problem& p, Scratch& s, bf16* out) {
  const int64_t stride = p.padded_rank();
  for (int64_t h = 0; h < p.heads; ++h) {
    const __m512 total = _mm512_set1_ps(s.total[h]);
    for (int64_t c = 0; c < p.rank; c += 16) {
      const __m512 value = _mm512_div_ps(_mm512_load_ps(s.sums.get() + h * stride + c), total);
      const __mmask16 inside = p.rank - c >= 16 ? 0xffff : (1u << (p.rank - c)) - 1;
      _mm256_mask_storeu_epi16(out + h * p.rank + c, inside, (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

void attend(const Problem& p, int64_t token, Scratch& s) {
  bf16* out = p.out + token * p.heads * p.rank;
  const int64_t count = valid_slots(p, token, s.slots.get()), width = p.padded_width();
  if (count == 0) {
    std::memset(out, 0, p.heads * p.rank * sizeof(bf16));
    return;
  }
  const bf16 *q = p.q + token * p.heads * p.width, *kv = p.kv + token / p.tokens * p.slots * p.width;
  for (int64_t g = 0; g < p.groups(); ++g)
    for (int64_t c = 0; c < width; c += CHANNELS)
      pack_right(q + g * ROWS * p.width + c, p.width, std::min(ROWS, p.heads - g * ROWS), p.width - c,
                 s.queries.get() + (g * width + c) * ROWS);
  std::fill_n(s.largest.get(), p.groups() * ROWS, -INFINITY);
  std::fill_n(s.total.get(), p.groups() * ROWS, 0.0f);
  std::fill_n(s.sums.get(), p.groups() * ROWS * p.padded_rank(), 0.0f);
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t here = std::min(BLOCK, count - first);
    gather(p, kv, s.slots.get() + first, here, s.rows.get());
    interleave(p, s.rows.get(), here, s.values.get());
    for (int64_t g = 0; g < p.groups(); ++g) {
      float* sums = s.sums.get() + g * ROWS * p.padded_rank();
      score(p, s.rows.get(), here, s.queries.get() + g * width * ROWS, s.logits.get());
      const __m512 factor = soften(p, s.logits.get(), here, s.weights.get(), s.largest.get() + g * ROWS, s.total.get() + g * ROWS);
      if (first > 0) rescale(sums, p.padded_rank(), factor);
      accumulate(p, s.weights.get(), here, s.values.get(), sums);
    }
  }
  finish(p, s, out);
}

}  // namespace

// q [batch, tokens, heads, width], kv [batch, slots, width], indices [batch, tokens, selected], out [batch, tokens, heads,
// rank]; false if memory ran out.
EXPORTED bool mla2dsa_sparse_mla_bfloat16(const bf16* q, const bf16* kv, const int32_t* indices, bf16* out, int64_t batch,
                                          int64_t tokens, int64_t slots, int64_t heads, int64_t width, int64_t rank,
                                          int64_t selected, float scale, int64_t threads) {
  const Problem p{q, kv, indices, out, tokens, slots, heads, width, rank, selected, scale};
  return share<Scratch>(batch * tokens, threads, [&] { return Scratch(p); },
                        [&](int64_t token, Scratch& s) { attend(p, token, s); });
}
