// sparse_mla on vectors: attention of each query over the key rows it selected, softmax and sums in float32.
//
// 16 heads lie side by side in the lanes, so that a key row is read a unit at a time, where it lies, and serves all heads:
// nothing is gathered. For the sums the lanes are channels of the rows. The softmax runs on, block by block.
//
// Neighbours that selected every key so far, as the first index_topk queries of a sequence do, go through its rows together:
// that is dense attention, with the same sums in the same order as each of them would have alone. A token's rows are summed in
// chunks, which threads share where there are fewer tokens than threads: how many threads there are changes no bit.
#include "attention.h"

namespace {

constexpr int64_t TOGETHER = 4;             // tokens at most that go through the same rows together
constexpr int64_t CHUNK = 512;              // rows that are summed for themselves

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
  int64_t packed_units() const { return round_up(units(), LANES); }                // of a query
  int64_t padded_rank() const { return round_up(rank, VECTORS * LANES); }           // channels that are summed
  int64_t row_units() const { return std::max(units(), padded_rank() / in_unit<T>); }   // of a row that may be read
  int64_t heads_held() const { return together * groups() * HEADS; }
  int64_t sums_held() const { return heads_held() * (padded_rank() + 2); }  // numbers in one Sums
  int64_t chunks() const { return std::max<int64_t>(1, (selected + CHUNK - 1) / CHUNK); }  // of a token
  // Whether rows can be read where they are: they are made of units, and reading padded_rank() stays within them.
  bool in_place() const {
    return (std::is_same<T, float>::value || paired<T>) && width % in_unit<T> == 0 && padded_rank() <= width;
  }
};

// What has been summed: values [heads, padded_rank] times e^-largest, for the heads of the tokens of a tile.
struct Sums {
  template <typename T>
  Sums(const Problem<T>& p, float* from)
      : values(from), largest(from + p.heads_held() * p.padded_rank()), total(largest + p.heads_held()) {}
  float *values, *largest, *total;
};

template <typename T>
struct Scratch {
  static constexpr int64_t BLOCK = UNITS * in_unit<T>;
  explicit Scratch(const Problem<T>& p)
      : slots(p.together * p.selected), rows(p.in_place() ? 0 : BLOCK * p.row_units()), nothing(p.row_units()),
        heads(HEADS * p.packed_units()), queries(p.together * p.groups() * p.packed_units() * HEADS), logits(BLOCK * HEADS), weights(UNITS * HEADS),
        whole(p.sums_held()), part(p.sums_held()), factor(HEADS) {}
  Buffer<int32_t> slots;
  Buffer<unit> rows, nothing, heads, queries;
  Buffer<float> logits;
  Buffer<unit> weights;
  Buffer<float> whole, part, factor;
  int64_t count[TOGETHER];  // of the slots of each token
  const unit* row[BLOCK + ROWS];  // of a block; ROWS more are fetched
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
void pack_queries(const Problem<T>& p, const T* q, unit* rows, unit* to) {
  const int64_t units = p.packed_units();
  for (int64_t g = 0; g < p.groups(); ++g, to += units * HEADS) {
    for (int64_t h = 0; h < HEADS; ++h) {
      const int64_t head = g * HEADS + h;
      copy_row(q + head * p.width, head < p.heads ? p.width : 0, rows + h * units, units);
    }
    for (int64_t h = 0; h < HEADS; h += LANES)
      for (int64_t u = 0; u < units; u += LANES) turn(rows + h * units + u, units, to + u * HEADS + h, HEADS);
  }
}

template <typename T>
void fetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += LINE * 4 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

// Where the rows of a block are: in the cache of the model, or in a copy; behind them rows of zeros, and what to fetch next.
template <typename T>
void find_rows(const Problem<T>& p, const T* kv, const int32_t* slots, int64_t count, int64_t beyond, Scratch<T>& s) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = kv + slots[i] * p.width;
    if (p.in_place()) {
      s.row[i] = reinterpret_cast<const unit*>(from);
    } else {
      if (i + ROWS < count + beyond) fetch(kv + slots[i + ROWS] * p.width, p.width);
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

// The first `count` rows of a block, for 16 heads of a token: group g of all of the tile.
template <typename T>
void attend_rows(const Problem<T>& p, int64_t count, int64_t g, Sums sum, Scratch<T>& s) {
  constexpr bool pair = paired<T>;
  const int64_t channels = p.padded_rank(), padded = round_up(count, in_unit<T>), used = padded / in_unit<T>;
  float* sums = sum.values + g * HEADS * channels;
  soften<pair>(p.scale, s.logits.get(), count, padded, s.weights.get(), sum.largest + g * HEADS, sum.total + g * HEADS,
               s.factor.get());
  rescale(sums, channels, s.factor.get());
  const unit* after = s.row[count];
  if (count < padded) s.row[count] = s.nothing.get();  // in a pair, 0 times a row that is NaN, for others to see, would be NaN
  const int64_t heads = round_up(std::min(HEADS, p.heads - g % p.groups() * HEADS), VALUE_HEADS);
  for (int64_t c = 0; c < channels; c += VECTORS * LANES)
    for (int64_t h = 0; h < heads; h += VALUE_HEADS)
      add_values<pair>(s.row, c, s.weights.get() + h, used, sums + h * channels, channels);
  s.row[count] = after;
}

// Rows first .. first + count of a list of slots, for all heads of the tokens whose list reaches there.
template <typename T>
void attend_block(const Problem<T>& p, int64_t first, int64_t count, int64_t tokens, Sums sum, Scratch<T>& s) {
  for (int64_t g = 0; g < tokens * p.groups(); ++g) {
    const int64_t here = std::min(s.count[g / p.groups()] - first, count);
    for (int64_t i = 0; i < here; i += ROWS)
      multiply<paired<T>>(s.row + i, s.queries.get() + g * p.packed_units() * HEADS, p.units(), s.logits.get() + i * HEADS);
    if (here > 0) attend_rows(p, here, g, sum, s);
  }
}

// Rows first .. end of a list of slots, with which the lists of the tokens of a tile begin.
template <typename T>
void attend_chunk(const Problem<T>& p, int64_t token, int64_t tokens, const int32_t* slots, int64_t first, int64_t end, Sums sum,
                  Scratch<T>& s) {
  const T* kv = p.kv + token / p.tokens * p.slots * p.width;
  const int64_t heads = tokens * p.groups() * HEADS;
  std::fill_n(sum.values, heads * p.padded_rank(), 0.0f);
  std::fill_n(sum.largest, heads, -INFINITY);
  std::fill_n(sum.total, heads, 0.0f);
  for (; first < end; first += s.BLOCK) {
    const int64_t here = std::min(s.BLOCK, end - first);
    find_rows(p, kv, slots + first, here, end - first - here, s);
    attend_block(p, first, here, tokens, sum, s);
  }
}

// Adds what another chunk of these tokens has summed.
template <typename T>
void merge(const Problem<T>& p, int64_t tokens, Sums whole, Sums part) {
  for (int64_t h = 0; h < tokens * p.groups() * HEADS; ++h) {
    const float peak = std::max(whole.largest[h], part.largest[h]), base = peak == -INFINITY ? 0.0f : peak;
    const float old = std::exp(whole.largest[h] - base), added = std::exp(part.largest[h] - base);
    whole.largest[h] = peak;
    whole.total[h] = whole.total[h] * old + part.total[h] * added;
    float *to = whole.values + h * p.padded_rank(), *from = part.values + h * p.padded_rank();
    for (int64_t c = 0; c < p.padded_rank(); ++c) to[c] = to[c] * old + from[c] * added;
  }
}

// What token t of a tile gets; 0 if it has no slots.
template <typename T>
void finish(const Problem<T>& p, int64_t token, int64_t t, int64_t count, Sums sum) {
  T* out = p.out + (token + t) * p.heads * p.rank;
  if (count == 0) {
    std::memset(out, 0, p.heads * p.rank * sizeof(T));
    return;
  }
  for (int64_t h = 0; h < p.heads; ++h, out += p.rank) {
    const float* values = sum.values + (t * p.groups() * HEADS + h) * p.padded_rank();
    const float total = sum.total[t * p.groups() * HEADS + h];
    for (int64_t c = 0; c < p.rank; c += VECTORS * LANES) {
      floats v[VECTORS];
      take_sums<paired<T>>(values + c, v);
      for (int64_t j = 0; j < VECTORS && c + j * LANES < p.rank; ++j)
        store_some(v[j] / total, std::min(LANES, p.rank - c - j * LANES), out + c + j * LANES);
    }
  }
}

// Tokens token .. token + tokens of a sequence, whose lists of slots all begin as the longest one does.
template <typename T>
void attend(const Problem<T>& p, int64_t token, int64_t tokens, const int32_t* slots, Scratch<T>& s) {
  const int64_t most = *std::max_element(s.count, s.count + tokens);
  const Sums whole(p, s.whole.get()), part(p, s.part.get());
  for (int64_t t = 0; t < tokens; ++t)
    pack_queries(p, p.q + (token + t) * p.heads * p.width, s.heads.get(), s.queries.get() + t * p.groups() * p.packed_units() * HEADS);
  for (int64_t first = 0; first < std::max<int64_t>(most, 1); first += CHUNK) {
    attend_chunk(p, token, tokens, slots, first, std::min(first + CHUNK, most), first > 0 ? part : whole, s);
    if (first > 0) merge(p, tokens, whole, part);
  }
  for (int64_t t = 0; t < tokens; ++t) finish(p, token, t, s.count[t], whole);
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
bool run_tiles(const Problem<T>& p, int64_t batch, int64_t threads) {
  const int64_t tiles = (p.tokens + p.together - 1) / p.together;
  return share<Scratch<T>>(batch * tiles, threads, [&] { return Scratch<T>(p); }, [&](int64_t item, Scratch<T>& s) {
    const int64_t first = item % tiles * p.together;
    run_tile(p, item / tiles * p.tokens + first, std::min(p.together, p.tokens - first), s);
  });
}

// Where there are fewer tokens than threads: each chunk of a token on its own.
template <typename T>
bool run_chunks(const Problem<T>& p, int64_t tokens, int64_t threads) {
  const int64_t chunks = p.chunks();
  Buffer<float> parts(tokens * chunks * p.sums_held());
  const auto part = [&](int64_t item) { return Sums(p, parts.get() + item * p.sums_held()); };
  return share<Scratch<T>>(tokens * chunks, threads, [&] { return Scratch<T>(p); }, [&](int64_t item, Scratch<T>& s) {
    const int64_t token = item / chunks, first = item % chunks * CHUNK;
    s.count[0] = valid_slots(p, token, s.slots.get());
    pack_queries(p, p.q + token * p.heads * p.width, s.heads.get(), s.queries.get());
    attend_chunk(p, token, 1, s.slots.get(), first, std::min(first + CHUNK, s.count[0]), part(item), s);
  }) && share<Scratch<T>>(tokens, 1, [&] { return Scratch<T>(p); }, [&](int64_t token, Scratch<T>& s) {
    for (int64_t i = 1; i < chunks; ++i) merge(p, 1, part(token * chunks), part(token * chunks + i));
    finish(p, token, 0, valid_slots(p, token, s.slots.get()), part(token * chunks));
  });
}

template <typename T>
bool run(const T* q, const T* kv, const int32_t* indices, T* out, int64_t batch, int64_t tokens, int64_t slots,
         int64_t heads, int64_t width, int64_t rank, int64_t selected, float scale, int64_t threads) {
  // fewer together where not all threads would have work, or what they hold would leave the cache
  const int64_t together = std::max<int64_t>(1, std::min({TOGETHER, batch * tokens / threads, TOGETHER * HEADS / heads}));
  const Problem<T> p{q, kv, indices, out, tokens, slots, heads, width, rank, selected, scale, together};
  try {
    return batch * tokens < threads && p.chunks() > 1 ? run_chunks(p, batch * tokens, threads) : run_tiles(p, batch, threads);
  } catch (const std::bad_alloc&) {
    return false;
  }
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
