// Averages of values, or of values and exponentials of them, under a softmax over keys: blocks of queries against blocks
// of keys, scores never whole (Dao et al., "FlashAttention", 2022). Floor, in products of 2 T S 64 operations per head
// of width 64 (half of them where causal): forward 3 (scores, two signals), one signal 2; backward 7 and 5. In bf16 the
// exponential is a sum of two numbers, forward 4 and backward 8 of half the time each.
#pragma once

#include <new>

#include "products.h"
#include "rows.h"

namespace helmholtz {

constexpr int64_t KEYS = 256, QUERIES = 64;  // of a block
constexpr int64_t STRIPE = 1024;             // queries that share what was made of a block of keys
constexpr int64_t FEW = 4;                   // queries up to which packing does not pay

// Memory that nothing has written yet, on a cache line.
template <typename T>
struct Room {
  T* data;
  explicit Room(int64_t n) : data(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {}
  Room(const Room&) = delete;
  ~Room() { ::operator delete(data, std::align_val_t(64)); }
  operator T*() const { return data; }
};

// Loops on numbers of their own: within a larger function a compiler leaves some of them scalar.
constexpr int64_t AT_ONCE = 64;

template <typename S, typename T>
__attribute__((noinline)) void tilts(const S* value, const T* rate, T cap, int64_t n, T* tilt) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const T x = wide(value[c]) * rate[c];
    tilt[c] = exp_of(x > cap ? cap : x < -cap ? -cap : x);
  }
}

// What S holds of each number, and what it does not.
template <typename S, typename T>
__attribute__((noinline)) void take_rest(T* x, int64_t n, T* rest) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const T whole = x[c];
    x[c] = stored<S>(whole);
    rest[c] = stored<S>(whole - x[c]);
  }
}

template <typename S, typename T>
__attribute__((noinline)) void tilt_gradients(const S* value, const T* rate, T cap, const T* dvalue, const T* dtilt,
                                              int64_t n, S* dv, T* dbeta) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const T x = wide(value[c]), y = x * rate[c];
    const T dexponent = y < cap && y > -cap ? exp_of(y) * dtilt[c] : T(0);
    dv[c] = narrow<S>(dvalue[c] + rate[c] * dexponent);
    dbeta[c] += x * dexponent;
  }
}

template <typename S, typename T>
__attribute__((noinline)) void round_row(const T* x, int64_t n, S* to) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[c] = narrow<S>(x[c]);
}

template <typename S>
struct SoftmaxRead {
  using T = at::opmath_type<S>;
  int64_t batch, heads, groups, times, sources, width, values, share;
  bool tilted;
  T scale, cap;
  Rows<const S> q, k, v;  // rows, heads, tokens
  const T* beta;
  const bool* real;
  std::vector<int64_t> from, to;  // the keys that a query sees, but for the pads among them
  int64_t wide, columns;          // of a key's row and of the signals' row, whole panels

  int64_t parts() const { return tilted ? (PAIRED<S> ? 3 : 2) : 1; }
  int64_t signals() const { return tilted ? 2 : 1; }
  int64_t rows() const { return times * share; }
  // Row i of a group is a token's query of one head.
  const S* query(int64_t b, int64_t g, int64_t i) const { return q.at(b, g * share + i % share, i / share); }

  struct Sizes {
    int64_t batch, heads, groups, times, sources, width, values;
  };

  SoftmaxRead(const Sizes& n, Rows<const S> queries, Rows<const S> keys, Rows<const S> given, const T* rate,
              const bool* mask, bool causal, double largest)
      : batch(n.batch), heads(n.heads), groups(n.groups), times(n.times), sources(n.sources), width(n.width),
        values(n.values), share(groups ? heads / groups : 0), tilted(rate != nullptr),
        scale(T(1 / std::sqrt(double(width)))), cap(T(largest)), q(queries), k(keys), v(given), beta(rate), real(mask),
        from(times, 0), to(times, sources), wide(round_up(width, PANEL<S>)),
        columns(round_up(parts() * values, PANEL<S>)) {
    if (causal)
      for (int64_t t = 0; t < times; ++t) to[t] = std::min(to[t], sources - times + t + 1);
  }

  SoftmaxRead(const Tensor& queries, const Tensor& keys, const Tensor& given, const Tensor& rate, const Tensor& mask,
              const Tensor& bounds, bool causal, double largest)
      : SoftmaxRead({queries.size(0), queries.size(1), keys.size(1), queries.size(2), keys.size(2), keys.size(3),
                     given.size(3)},
                    rows_of<S>(queries), rows_of<S>(keys), rows_of<S>(given), in<T>(rate), in<bool>(mask), causal,
                    largest) {
    if (!bounds.defined()) return;
    const Tensor ends = bounds.to(at::kLong).contiguous();
    const int64_t* end = ends.const_data_ptr<int64_t>();
    for (int64_t i = 0; i + 1 < ends.numel(); ++i)
      for (int64_t t = std::max<int64_t>(end[i], 0); t < std::min(end[i + 1], times); ++t)
        from[t] = end[i], to[t] = std::min(end[i + 1], to[t]);
  }

  // The signals of a value's row: the values, their exponentials, in bf16 the rest of these; then zeros.
  void tilt_row(const S* value, const T* rate, S* signal) const {
    std::copy_n(value, values, signal);
    std::fill(signal + parts() * values, signal + columns, S(0));
    if (!tilted) return;
    T tilt[AT_ONCE], rest[AT_ONCE];
    for (int64_t c = 0; c < values; c += AT_ONCE) {
      const int64_t n = std::min(AT_ONCE, values - c);
      tilts(value + c, rate + c, cap, n, tilt);
      if constexpr (PAIRED<S>) {
        take_rest<S>(tilt, n, rest);
        narrow_row<S>(rest, n, signal + 2 * values + c);
      }
      narrow_row<S>(tilt, n, signal + values + c);
    }
  }

  void key_rows(int64_t b, int64_t g, int64_t first, int64_t n, S* rows) const {
    for (int64_t j = 0; j < n; ++j, rows += wide) {
      std::copy_n(k.at(b, g, first + j), width, rows);
      std::fill(rows + width, rows + wide, S(0));
    }
  }

  void signal_rows(int64_t b, int64_t g, int64_t first, int64_t n, S* rows) const {
    for (int64_t j = 0; j < n; ++j, rows += columns) tilt_row(v.at(b, g, first + j), beta + g * values, rows);
  }

  // Queries of a block, a multiple of TILE: those that are too many are 0.
  void query_rows(int64_t b, int64_t g, int64_t first, int64_t n, S* rows) const {
    for (int64_t i = 0; i < round_up(n, TILE); ++i, rows += wide) {
      if (i < n) std::copy_n(query(b, g, first + i), width, rows);
      std::fill(rows + (i < n ? width : 0), rows + wide, S(0));
    }
  }

  // 0 for a key that may be seen, else -infinity; nothing where all may.
  const T* pads(int64_t b, int64_t first, int64_t n, T* room) const {
    if (real == nullptr) return nullptr;
    for (int64_t j = 0; j < n; ++j) room[j] = real[b * sources + first + j] ? T(0) : T(-INFINITY);
    return room;
  }
};

// Where a block of queries meets a block of keys: columns that some query sees, in whole panels.
struct Meeting {
  int64_t first, last;
  template <typename S>
  Meeting(const SoftmaxRead<S>& p, int64_t row, int64_t count, int64_t key, int64_t n) {
    const int64_t a = p.from[row / p.share] - key, b = p.to[(row + count - 1) / p.share] - key;
    first = std::max<int64_t>(a, 0) / PANEL<S> * PANEL<S>;
    last = std::min(b, n);
  }
};

// One query's scores of keys first ... last - 1, of which it sees a ... b - 1, made weights relative to its largest
// score so far; the sums so far fade where that grows. What is summed up are the weights as S holds them.
template <bool MASKED, typename S, typename T>
void weigh(T* score, const T* pads, T scale, int64_t first, int64_t a, int64_t b, int64_t last, T& top, T& mass, T* sums,
           int64_t columns) {
  T most = top;
#pragma omp simd reduction(max : most)
  for (int64_t j = a; j < b; ++j) {
    const T x = score[j] * scale + (MASKED ? pads[j] : T(0));
    most = most > x ? most : x;
  }
  if (a >= b || most == T(-INFINITY)) {
    for (int64_t j = a; j < b; ++j)  // no score, or none but NaN, which comparisons pass over
      if (score[j] != score[j] && !(MASKED && pads[j] != T(0))) mass = score[j];
    std::fill(score + first, score + last, T(0));
    return;
  }
  if (most > top) {
    const T fade = exp_of(top - most);
    mass *= fade;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) sums[c] *= fade;
  }
  top = most;
  T total = 0;
  std::fill(score + first, score + a, T(0));
#pragma omp simd reduction(+ : total)
  for (int64_t j = a; j < b; ++j) {
    const T w = stored<S>(exp_of(score[j] * scale + (MASKED ? pads[j] : T(0)) - most));
    score[j] = w;
    total += w;
  }
  std::fill(score + b, score + last, T(0));
  mass += total;
}

template <typename S, typename T = at::opmath_type<S>>
void read_stripe(const SoftmaxRead<S>& p, int64_t b, int64_t g, int64_t start, int64_t end, Rows<T> mixed, T* lse) {
  const int64_t keys = std::min(KEYS, round_up(p.sources, PANEL<S>)), queries = std::min(QUERIES, round_up(end - start, TILE));
  const int64_t key_depth = p.wide / DEPTH<S>, depth = (p.width + DEPTH<S> - 1) / DEPTH<S>, count = end - start;
  Room<S> rows(keys * std::max(p.wide, p.columns)), query(round_up(count, TILE) * p.wide);
  Room<S> narrowed(PAIRED<S> ? queries * keys : 0);
  Room<Unit<S>> by_key(keys * key_depth), signals(keys / DEPTH<S> * p.columns);
  Room<T> scores(queries * keys), sums(round_up(count, TILE) * p.columns), top(count), mass(count), room(keys);
  std::fill_n(sums.data, round_up(count, TILE) * p.columns, T(0));
  std::fill_n(top.data, count, T(-INFINITY));
  std::fill_n(mass.data, count, T(0));
  p.query_rows(b, g, start, count, query);
  for (int64_t key = p.from[start / p.share] / KEYS * KEYS; key < p.to[(end - 1) / p.share]; key += KEYS) {
    const int64_t n = std::min(KEYS, p.sources - key);
    p.key_rows(b, g, key, n, rows);
    pack_transposed<S>(rows, p.wide, n, by_key, key_depth);
    p.signal_rows(b, g, key, n, rows);
    pack_rows<S>(rows, p.columns, n, p.columns, signals, keys / DEPTH<S>);
    const T* pads = p.pads(b, key, n, room);
    for (int64_t row = 0; row < count; row += QUERIES) {
      const int64_t here = std::min(QUERIES, count - row), tiles = round_up(here, TILE);
      const Meeting m(p, start + row, here, key, n);
      if (m.first >= m.last) continue;
      const int64_t width = round_up(m.last - m.first, DEPTH<S>), last = m.first + width;
      product<S, false>({reinterpret_cast<const Unit<S>*>(query + row * p.wide), key_depth, 1},
                        by_key + m.first * key_depth, key_depth, scores + m.first, keys, tiles, m.last - m.first, depth);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = row + std::min(i, here - 1), t = (start + at) / p.share;
        const int64_t a = std::min(std::max(p.from[t] - key, m.first), m.last);
        const int64_t z = i < here ? std::max(std::min(p.to[t] - key, m.last), a) : a;
        const auto work = pads ? weigh<true, S, T> : weigh<false, S, T>;
        work(scores + i * keys, pads, p.scale, m.first, a, z, last, top[at], mass[at], sums + at * p.columns, p.columns);
        if (PAIRED<S>) narrow_row<S>(scores + i * keys + m.first, width, narrowed + i * keys + m.first);
      }
      const auto* weights = reinterpret_cast<const Unit<S>*>(PAIRED<S> ? static_cast<const void*>(narrowed + m.first)
                                                                       : scores + m.first);
      product<S, true>({weights, keys / DEPTH<S>, 1},
                       signals + m.first / DEPTH<S> * PANEL<S>, keys / DEPTH<S>, sums + row * p.columns, p.columns, tiles,
                       p.columns, width / DEPTH<S>);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t h = g * p.share + (start + i) % p.share, t = (start + i) / p.share;
    T *to = mixed.at(b, h, t), *sum = sums + i * p.columns;
    const T inverse = mass[i] == T(0) ? T(0) : T(1) / mass[i];
    for (int64_t c = 0; c < p.signals() * p.values; ++c) {
      const bool rest = PAIRED<S> && c >= p.values;
      to[c] = (sum[c] + (rest ? sum[c + p.values] : T(0))) * inverse;
    }
    // a query that saw nothing: its weights, exp(score - lse), are to be 0
    lse[(b * p.heads + h) * p.times + t] = mass[i] == T(0) ? T(INFINITY) : top[i] + log_of(mass[i]);
  }
}

// A stream's step: no packing, every key's row is read once.
template <typename S, typename T = at::opmath_type<S>>
void read_few(const SoftmaxRead<S>& p, int64_t b, int64_t g, Rows<T> mixed, T* lse) {
  const int64_t n = p.sources, rows = p.rows(), columns = p.signals() * p.values;
  Room<T> weights(rows * n), query(rows * p.width), signal(columns), sums(rows * columns), room(n);
  const T* pads = p.pads(b, 0, n, room);
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = p.query(b, g, i);
    for (int64_t c = 0; c < p.width; ++c) query[i * p.width + c] = wide(from[c]) * p.scale;
  }
  for (int64_t j = 0; j < n; ++j) {
    const S* key = p.k.at(b, g, j);
    for (int64_t i = 0; i < rows; ++i) {
      T sum = 0;
      const T* x = query + i * p.width;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < p.width; ++c) sum += x[c] * wide(key[c]);
      weights[i * n + j] = sum + (pads ? pads[j] : T(0));
    }
  }
  int64_t first = n, last = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t t = i / p.share, h = g * p.share + i % p.share;
    T *weight = weights + i * n, top = -INFINITY, mass = 0;
    T& out = lse[(b * p.heads + h) * p.times + t];
    weigh<false, T, T>(weight, nullptr, T(1), 0, std::min(p.from[t], n), std::max<int64_t>(p.to[t], 0), n, top, mass,
                       nullptr, 0);
    out = mass == T(0) ? T(INFINITY) : top + log_of(mass);
    const T inverse = mass == T(0) ? T(0) : T(1) / mass;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) weight[j] *= inverse;
    first = std::min(first, p.from[t]), last = std::max(last, p.to[t]);
  }
  std::fill_n(sums.data, rows * columns, T(0));
  const T* rate = p.beta + g * p.values;
  for (int64_t j = first; j < last; ++j) {
    const S* value = p.v.at(b, g, j);
    for (int64_t c = 0; c < p.values; ++c) signal[c] = wide(value[c]);
    if (p.tilted) tilts(value, rate, p.cap, p.values, signal + p.values);
    for (int64_t i = 0; i < rows; ++i) {
      const T w = weights[i * n + j];
      T* to = sums + i * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] += w * signal[c];
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    std::copy_n(sums + i * columns, columns, mixed.at(b, g * p.share + i % p.share, i / p.share));
}

template <typename S>
struct ReadGradients {
  using T = at::opmath_type<S>;
  Rows<const T> dmixed, mixed;
  const T* lse;
  Rows<S> dq, dk, dv;
  T* dbeta;
};

// The gradients of a query's averages as the operand that meets the signals, in bf16 the exponential's twice.
template <typename S, typename T>
void gradient_row(const SoftmaxRead<S>& p, const T* grad, S* row, T* room) {
  const int64_t n = p.signals() * p.values;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) room[c] = stored<S>(grad[c]);
  narrow_row<S>(room, n, row);
  if (p.parts() == 3) std::copy_n(row + p.values, p.values, row + n);
  std::fill(row + p.parts() * p.values, row + p.columns, S(0));
}

// What the normalisation takes off: the product of a query's averages and their gradients as `gradient_row` rounds them.
template <typename S, typename T>
T along_row(const T* grad, const T* mixed, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < n; ++c) sum += stored<S>(grad[c]) * mixed[c];
  return sum;
}

// One query's scores made weights, the gradients of its weights made those of its scores; 0 where it does not see.
template <bool MASKED, typename S, typename T>
void score_gradients(T* score, T* grad, const T* pads, T scale, T lse, T along, int64_t first, int64_t a, int64_t b,
                     int64_t last) {
  for (T* x : {score, grad}) {
    std::fill(x + first, x + a, T(0));
    std::fill(x + b, x + last, T(0));
  }
#pragma omp simd
  for (int64_t j = a; j < b; ++j) {
    const T w = exp_of(score[j] * scale + (MASKED ? pads[j] : T(0)) - lse);
    score[j] = stored<S>(w);
    grad[j] = stored<S>(w * (grad[j] - along) * scale);
  }
}

template <typename S, typename T = at::opmath_type<S>>
void read_backward(const SoftmaxRead<S>& p, int64_t b, int64_t g, const ReadGradients<S>& to) {
  const int64_t count = p.rows(), keys = std::min(KEYS, round_up(p.sources, PANEL<S>));
  const int64_t queries = std::min(QUERIES, round_up(count, TILE)), two = p.signals() * p.values;
  const int64_t deep = p.wide / DEPTH<S>, depth = (p.width + DEPTH<S> - 1) / DEPTH<S>, out = round_up(two, PANEL<S>);
  const int64_t grad_depth = p.columns / DEPTH<S>, keys_deep = keys / DEPTH<S>, rows_deep = queries / DEPTH<S>;
  Room<S> rows(keys * std::max(p.wide, p.columns)), query(queries * p.wide), grads(queries * p.columns);
  Room<S> drows(PAIRED<S> ? queries * keys : 0);
  Room<Unit<S>> stacks(PAIRED<S> ? 2 * rows_deep * keys : 0);
  Room<Unit<S>> by_key(keys * deep), key_panels(keys_deep * p.wide), by_signal(keys * grad_depth);
  Room<Unit<S>> query_panels(rows_deep * p.wide), grad_panels(rows_deep * p.columns);
  Room<T> scores(queries * keys), dweights(queries * keys), dq(round_up(count, TILE) * p.wide), dk(keys * p.wide);
  Room<T> dsignals(keys * out), lse(count), along(count), room(keys), room_of_row(two);
  const auto head = [&](int64_t i) { return g * p.share + i % p.share; };
  std::fill_n(dq.data, round_up(count, TILE) * p.wide, T(0));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t h = head(i), t = i / p.share;
    lse[i] = to.lse[(b * p.heads + h) * p.times + t];
    along[i] = along_row<S>(to.dmixed.at(b, h, t), to.mixed.at(b, h, t), two);
  }
  for (int64_t key = 0; key < p.sources; key += KEYS) {
    const int64_t n = std::min(KEYS, p.sources - key);
    p.key_rows(b, g, key, n, rows);
    pack_transposed<S>(rows, p.wide, n, by_key, deep);
    pack_rows<S>(rows, p.wide, n, p.wide, key_panels, keys_deep);
    p.signal_rows(b, g, key, n, rows);
    pack_transposed<S>(rows, p.columns, n, by_signal, grad_depth);
    const T* pads = p.pads(b, key, n, room);
    std::fill_n(dk.data, keys * p.wide, T(0));
    std::fill_n(dsignals.data, keys * out, T(0));
    for (int64_t row = 0; row < count; row += QUERIES) {
      const int64_t here = std::min(QUERIES, count - row), tiles = round_up(here, TILE);
      const Meeting m(p, row, here, key, n);
      if (m.first >= m.last) continue;
      const int64_t span = m.last - m.first, height = (here + DEPTH<S> - 1) / DEPTH<S>;
      p.query_rows(b, g, row, here, query);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = row + std::min(i, here - 1);
        gradient_row<S>(p, to.dmixed.at(b, head(at), at / p.share), grads + i * p.columns, room_of_row.data);
      }
      pack_rows<S>(query, p.wide, here, p.wide, query_panels, rows_deep);
      pack_rows<S>(grads, p.columns, here, out, grad_panels, rows_deep);
      product<S, false>({reinterpret_cast<const Unit<S>*>(query.data), deep, 1}, by_key + m.first * deep, deep,
                        scores + m.first, keys, tiles, span, depth);
      product<S, false>({reinterpret_cast<const Unit<S>*>(grads.data), grad_depth, 1}, by_signal + m.first * grad_depth,
                        grad_depth, dweights + m.first, keys, tiles, span,
                        (p.parts() * p.values + DEPTH<S> - 1) / DEPTH<S>);
      const int64_t end = m.first + round_up(span, TILE);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t at = row + std::min(i, here - 1), t = at / p.share;
        const int64_t a = std::min(std::max(p.from[t] - key, m.first), m.last);
        const int64_t z = i < here ? std::max(std::min(p.to[t] - key, m.last), a) : a;
        const auto work = pads ? score_gradients<true, S, T> : score_gradients<false, S, T>;
        work(scores + i * keys, dweights + i * keys, pads, p.scale, lse[at], along[at], m.first, a, z, end);
      }
      const Unit<S>*stacked_weights, *stacked_scores, *score_rows;
      if constexpr (PAIRED<S>) {
        stack_rows(scores + m.first, keys, tiles, end - m.first, stacks.data, keys);
        stack_rows(dweights + m.first, keys, tiles, end - m.first, stacks + rows_deep * keys, keys);
        for (int64_t i = 0; i < tiles; ++i) narrow_row<S>(dweights + i * keys + m.first, end - m.first, drows + i * keys);
        stacked_weights = stacks, stacked_scores = stacks + rows_deep * keys;
        score_rows = reinterpret_cast<const Unit<S>*>(drows.data);
      } else {
        stacked_weights = scores + m.first, stacked_scores = score_rows = dweights + m.first;
      }
      product<S, true>({stacked_weights, 1, keys}, grad_panels, rows_deep, dsignals + m.first * out, out,
                       round_up(span, TILE), two, height);
      product<S, true>({stacked_scores, 1, keys}, query_panels, rows_deep, dk + m.first * p.wide, p.wide,
                       round_up(span, TILE), p.width, height);
      product<S, true>({score_rows, keys_deep, 1},
                       key_panels + m.first / DEPTH<S> * PANEL<S>, keys_deep, dq + row * p.wide, p.wide, tiles, p.width,
                       (span + DEPTH<S> - 1) / DEPTH<S>);
    }
    for (int64_t j = 0; j < n; ++j) {
      const S* value = p.v.at(b, g, key + j);
      const T *rate = p.beta + g * p.values, *d = dsignals + j * out;
      S* dv = to.dv.at(b, g, key + j);
      round_row(dk + j * p.wide, p.width, to.dk.at(b, g, key + j));
      if (p.tilted) {
        tilt_gradients(value, rate, p.cap, d, d + p.values, p.values, dv, to.dbeta + (b * p.groups + g) * p.values);
      } else {
        round_row(d, p.values, dv);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i)
    round_row(dq + i * p.wide, p.width, to.dq.at(b, head(i), i / p.share));
}

template <typename S, typename T = at::opmath_type<S>>
void softmax_read_all(const SoftmaxRead<S>& p, Rows<T> to, T* low) {
  const int64_t pairs = p.batch * p.groups, rows = p.rows();
  if (pairs * rows == 0) return;
  if (rows <= FEW) {
    const int64_t cost = std::max<int64_t>(p.sources * (rows * (p.width + 2 * p.values) + 16 * p.values), 1);
    at::parallel_for(0, pairs, std::max<int64_t>(1, 400000 / cost), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) read_few<S>(p, i / p.groups, i % p.groups, to, low);
    });
    return;
  }
  // a query's result does not depend on which others share its stripe, so that threads may decide how many there are
  const int64_t threads = at::get_num_threads(), wanted = (threads + pairs - 1) / pairs;
  const int64_t length = std::min(STRIPE, round_up(std::max<int64_t>((rows + wanted - 1) / wanted, 1), QUERIES));
  const int64_t stripes = (rows + length - 1) / length;
  each(pairs * stripes, [&](int64_t part) {
    const int64_t pair = part / stripes, start = part % stripes * length;
    read_stripe<S>(p, pair / p.groups, pair % p.groups, start, std::min(start + length, rows), to, low);
  });
}

// Averages whose signals lie side by side.
inline Tensor with_signals_together(const Tensor& x) {
  const bool together = x.stride(4) == 1 && (x.size(3) == 1 || x.stride(3) == x.size(4));
  return together ? x : x.contiguous();
}

inline void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& beta, const Maybe& key_mask) {
  const auto batch = q.size(0), groups = k.size(1);
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == batch && v.size(0) == batch &&
                        v.size(1) == groups && v.size(2) == k.size(2) && q.size(3) == k.size(3) &&
                        (groups ? q.size(1) % groups == 0 : q.size(1) == 0),
                    "q, k, v: shapes ", q.sizes(), ", ", k.sizes(), " and ", v.sizes(), " do not belong together");
  TORCH_CHECK_VALUE(!beta || beta->sizes() == at::IntArrayRef({groups, v.size(3)}), "beta: wanted one per value head and ",
                    "channel, got shape ", beta ? beta->sizes() : at::IntArrayRef());
  TORCH_CHECK_VALUE(!key_mask || key_mask->sizes() == at::IntArrayRef({batch, k.size(2)}), "key_mask: wanted one per key");
}

inline std::tuple<Tensor, Tensor> softmax_read_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& beta,
                                                   const Maybe& key_mask, const Maybe& cu_seqlens, bool causal,
                                                   double cap) {
  check_shapes(q, k, v, beta, key_mask);
  const Tensor queries = with_whole_rows(q), keys = with_whole_rows(k), values = with_whole_rows(v);
  const auto options = q.options().dtype(at::toOpMathType(q.scalar_type()));
  const int64_t signals = beta.has_value() ? 2 : 1;
  Tensor mixed = at::empty({q.size(0), q.size(2), q.size(1), signals, v.size(3)}, options).transpose(1, 2);
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, options);
  const Tensor rate = beta ? beta->contiguous() : Tensor(), mask = key_mask ? key_mask->contiguous() : Tensor();
  STORED(q, S, using T = at::opmath_type<S>;
         softmax_read_all<S>(SoftmaxRead<S>(queries, keys, values, rate, mask, defined(cu_seqlens), causal, cap),
                             new_rows<T>(mixed), out<T>(lse)));
  return {mixed, lse};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_read_backward_cpu(
    const Tensor& dmixed, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& beta, const Maybe& key_mask,
    const Maybe& cu_seqlens, const Tensor& mixed, const Tensor& lse, bool causal, double cap) {
  const Tensor queries = with_whole_rows(q), keys = with_whole_rows(k), values = with_whole_rows(v);
  const Tensor grads = with_signals_together(dmixed), averages = with_signals_together(mixed), low = lse.contiguous();
  const auto tokens_first = [](const Tensor& x) {
    return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  Tensor dq = tokens_first(q), dk = tokens_first(k), dv = tokens_first(v);
  const Tensor rate = beta ? beta->contiguous() : Tensor(), mask = key_mask ? key_mask->contiguous() : Tensor();
  Tensor sums = rate.defined() ? at::zeros({q.size(0), rate.size(0), rate.size(1)}, rate.options()) : Tensor();
  STORED(q, S, {
    using T = at::opmath_type<S>;
    const SoftmaxRead<S> p(queries, keys, values, rate, mask, defined(cu_seqlens), causal, cap);
    const ReadGradients<S> to{rows_of<T>(grads), rows_of<T>(averages), in<T>(low),    new_rows<S>(dq),
                              new_rows<S>(dk),   new_rows<S>(dv),      out<T>(sums)};
    each(p.batch * p.groups, [&](int64_t i) { read_backward<S>(p, i / p.groups, i % p.groups, to); });
  });
  return {dq, dk, dv, rate.defined() ? sums.sum(0) : at::empty({0}, mixed.options())};
}

struct SoftmaxReadFunction : torch::autograd::Function<SoftmaxReadFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Maybe& beta, const Maybe& key_mask, const Maybe& cu_seqlens, bool causal,
                               double cap) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("softmax_read", decltype(softmax_read_cpu));
    auto [mixed, lse] = op.call(q, k, v, beta, key_mask, cu_seqlens, causal, cap);
    ctx->mark_non_differentiable({lse});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, defined(beta), defined(key_mask), defined(cu_seqlens), mixed, lse});
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["cap"] = cap;
    return {mixed, lse};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("softmax_read_backward", decltype(softmax_read_backward_cpu));
    if (!grads[0].defined()) return variable_list(8);
    const auto s = ctx->get_saved_variables();
    auto [dq, dk, dv, dbeta] = op.call(grads[0], s[0], s[1], s[2], maybe(s[3]), maybe(s[4]), maybe(s[5]), s[6], s[7],
                                       ctx->saved_data["causal"].toBool(), ctx->saved_data["cap"].toDouble());
    return {dq, dk, dv, s[3].defined() ? dbeta : Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

inline std::tuple<Tensor, Tensor> softmax_read_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                        const Maybe& beta, const Maybe& key_mask,
                                                        const Maybe& cu_seqlens, bool causal, double cap) {
  const auto done = SoftmaxReadFunction::apply(q, k, v, beta, key_mask, cu_seqlens, causal, cap);
  return {done[0], done[1]};
}

}  // namespace helmholtz
