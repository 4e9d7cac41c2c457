// o_t = S_t^T q_t, S_t = e^{g_t} S_{t-1} + k_t v_t^T, in chunks of L = 64 steps, a head at a time in a core's cache:
//   P = (q k^T) * w,  o = P v + (a q) S,  S' = a_L S + (b k)^T v,
// w_ij what decays from step j to step i, a_i from the chunk's start to i, b_j from j to its end. With `normalize` v has
// one more column, of ones, by whose result the others are divided. Floor: L/2 (K + V) + 2 K V multiply-adds per step
// forward, L K + 3/2 L (K + V) + 5 K V backward, L/2 exponentials each.
#pragma once

#include "products.h"

namespace helmholtz {

constexpr int64_t CHUNK = 64;

// B H T W in the caller's dtype: rows of W numbers lie anywhere.
template <typename T>
struct HeadRows {
  const void* data;
  bool half;
  int64_t b, h, t;
  void load(int64_t i, int64_t j, int64_t step, T* to, int64_t width) const {
    const int64_t at = i * b + j * h + step * t;
    if (half) {
      const auto* from = static_cast<const at::BFloat16*>(data) + at;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) to[c] = T(wide(from[c]));
    } else {
      std::copy_n(static_cast<const T*>(data) + at, width, to);
    }
  }
  void store(int64_t i, int64_t j, int64_t step, const T* from, int64_t width) const {
    const int64_t at = i * b + j * h + step * t;
    if (half) {
      auto* to = static_cast<at::BFloat16*>(const_cast<void*>(data)) + at;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) to[c] = narrow<at::BFloat16>(float(from[c]));
    } else {
      std::copy_n(from, width, static_cast<T*>(const_cast<void*>(data)) + at);
    }
  }
};

template <typename T>
HeadRows<T> heads_of(const Tensor& x) {
  if (!x.defined()) return {nullptr, false, 0, 0, 0};
  return {x.const_data_ptr(), x.scalar_type() == at::kBFloat16, x.stride(0), x.stride(1), x.stride(2)};
}

struct LinearSizes {
  int64_t batch, heads, steps, keys, values;
  bool strict, normalize;
  int64_t columns() const { return values + normalize; }
  int64_t length() const { return std::min(CHUNK, padded(steps)); }
  int64_t k() const { return padded(keys); }
  int64_t v() const { return padded(columns()); }
  int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
};

// Matrices of a chunk, one after another in one piece of memory that starts as 0.
template <typename T>
struct Memory {
  explicit Memory(int64_t size) : numbers(size, T(0)) {}
  T* take(int64_t size) {
    T* from = numbers.data() + used;
    used += size;
    return from;
  }
  std::vector<T> numbers;
  int64_t used = 0;
};

// Decays of a chunk of n steps: w (lower, L by L), a and b. Without decays all are 1.
template <typename T>
struct Decays {
  T *w, *since, *until, *sums;
  const T* g;
  void fill(int64_t n, int64_t length) const {
    std::fill_n(sums, length, T(0));
    double total = 0;  // of a whole chunk: its rounding is the exponential's relative error
    for (int64_t i = 0; i < n; ++i) {
      T* to = w + i * length;
      const T here = g == nullptr ? T(0) : g[i];
      total += here;
      since[i] = g == nullptr ? T(1) : exp_of(T(total));
      if (g == nullptr) {
        std::fill_n(to, i, T(1));
      } else {
#pragma omp simd
        for (int64_t j = 0; j < i; ++j) {
          sums[j] += here;
          to[j] = exp_of(sums[j]);
        }
      }
      to[i] = T(1);
    }
    std::copy_n(w + (n - 1) * length, n, until);
  }
};

// p *= w, 0 above the diagonal (and on it, if strict) and beyond n.
template <typename T>
void weigh(T* p, const T* w, int64_t n, int64_t length, bool strict) {
  for (int64_t i = 0; i < length; ++i) {
    const int64_t end = i < n ? i + !strict : 0;
#pragma omp simd
    for (int64_t j = 0; j < end; ++j) p[i * length + j] *= w[i * length + j];
    std::fill(p + i * length + end, p + (i + 1) * length, T(0));
  }
}

template <typename T>
void scaled_rows(const T* from, const T* by, T* to, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) to[i * width + c] = by[i] * from[i * width + c];
}

// The rows of a chunk, those from n on 0.
template <typename T>
void load_chunk(const HeadRows<T>& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t length, T* to, int64_t width,
                int64_t stored, bool ones = false) {
  for (int64_t i = 0; i < n; ++i) {
    x.load(b, h, first + i, to + i * stored, width);
    if (ones) to[i * stored + width] = T(1);
  }
  std::fill(to + n * stored, to + length * stored, T(0));
}

template <typename T>
void load_matrix(const T* from, T* to, int64_t m, int64_t n, int64_t stored) {
  for (int64_t i = 0; i < m; ++i) std::copy_n(from + i * n, n, to + i * stored);
}
template <typename T>
void store_matrix(const T* from, T* to, int64_t m, int64_t n, int64_t stored) {
  for (int64_t i = 0; i < m; ++i) std::copy_n(from + i * stored, n, to + i * n);
}

template <typename T>
struct LinearInputs {
  HeadRows<T> q, k, v;
  const T *g, *state;  // g: B H T or null
  const T* decays(int64_t part, int64_t first, const LinearSizes& z) const {
    return g == nullptr ? nullptr : g + part * z.steps + first;
  }
};

template <typename T>
void linear_forward(const LinearInputs<T>& in, const HeadRows<T>& out, T* last, T* starts, T* mass, LinearSizes z) {
  const int64_t L = z.length(), K = z.k(), V = z.v();
  const auto work = [&](int64_t part) {
    const int64_t b = part / z.heads, h = part % z.heads;
    Memory<T> memory(2 * L * K + 2 * L * V + K * L + 2 * L * L + K * V + 3 * L);
    T *q = memory.take(L * K), *k = memory.take(L * K), *kt = memory.take(K * L), *v = memory.take(L * V);
    T *o = memory.take(L * V), *p = memory.take(L * L), *s = memory.take(K * V);
    const Decays<T> empty{memory.take(L * L), memory.take(L), memory.take(L), memory.take(L), nullptr};
    load_matrix(in.state + part * z.keys * z.columns(), s, z.keys, z.columns(), V);
    for (int64_t first = 0; first < z.steps; first += CHUNK) {
      const int64_t n = std::min(CHUNK, z.steps - first);
      store_matrix(s, starts + (part * z.chunks() + first / CHUNK) * z.keys * z.columns(), z.keys, z.columns(), V);
      Decays<T> decays = empty;
      decays.g = in.decays(part, first, z);
      decays.fill(n, L);
      load_chunk(in.q, b, h, first, n, L, q, z.keys, K);
      load_chunk(in.k, b, h, first, n, L, k, z.keys, K);
      load_chunk(in.v, b, h, first, n, L, v, z.values, V, z.normalize);
      transpose(k, kt, L, K);
      multiply<false, Part::LOWER_RESULT>(L, K, L, rows(q, K), kt, p);
      weigh(p, decays.w, n, L, z.strict);
      multiply<false, Part::LOWER_LEFT>(L, L, V, rows(p, L), v, o);
      scaled_rows(q, decays.since, q, n, K);
      multiply<true>(L, K, V, rows(q, K), s, o);
      for (int64_t i = 0; i < n; ++i) {
        T* row = o + i * V;
        if (z.normalize) {
          const T sum = row[z.values], by = sum > T(0) ? T(1) / sum : T(1);
          mass[part * z.steps + first + i] = sum;
#pragma omp simd
          for (int64_t c = 0; c < z.values; ++c) row[c] *= by;
        }
        out.store(b, h, first + i, row, z.values);
      }
      scaled_rows(k, decays.until, k, n, K);
      const T kept = decays.since[n - 1];
#pragma omp simd
      for (int64_t i = 0; i < K * V; ++i) s[i] *= kept;
      multiply<true>(K, L, V, columns(k, K), v, s);
    }
    store_matrix(s, last + part * z.keys * z.columns(), z.keys, z.columns(), V);
  };
  each(z.batch * z.heads, work, z.keys * z.columns() * std::max<int64_t>(1, z.steps / 4));
}

template <typename T>
INLINE T dot(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// The gradient of a decay sums the pairs that its step separates: i from it on, j before it. `e` holds the pairs inside the
// chunk, `after` what reads the state from before it, `before` what the state after it holds, `through` both.
template <typename T>
void decay_gradients(const T* e, const T* after, const T* before, T through, T* columns, T* dg, int64_t n,
                     int64_t length) {
  std::fill_n(columns, length, T(0));
  T reads = through, writes = 0;
  for (int64_t s = n - 1; s >= 0; --s) {
    T total = 0;
    reads += after[s];
#pragma omp simd
    for (int64_t j = 0; j < s; ++j) columns[j] += e[s * length + j];
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < s; ++j) total += columns[j];
    dg[s] = total + reads;
  }
  for (int64_t s = 0; s < n; ++s) {
    dg[s] += writes;
    writes += before[s];
  }
}

template <typename T>
struct LinearGradients {
  HeadRows<T> q, k, v;
  T *g, *state;
};

template <typename T>
struct LinearResults {  // what comes in: gradients, and what the forward pass kept
  HeadRows<T> dout, out;
  const T *dlast, *starts, *mass;
};

// The gradient of the sums from that of their quotients by the last.
template <typename T>
void undo_division(const LinearResults<T>& r, int64_t b, int64_t h, int64_t part, int64_t first, int64_t n, T* dout,
                   T* out, const LinearSizes& z, int64_t stored) {
  for (int64_t i = 0; i < n; ++i) {
    const T sum = r.mass[part * z.steps + first + i], by = sum > T(0) ? T(1) / sum : T(1);
    T* row = dout + i * stored;
    r.out.load(b, h, first + i, out, z.values);
#pragma omp simd
    for (int64_t c = 0; c < z.values; ++c) row[c] *= by;
    row[z.values] = sum > T(0) ? -dot(row, out, z.values) : T(0);
  }
}

template <typename T>
void linear_reverse(const LinearInputs<T>& in, const LinearResults<T>& r, const LinearGradients<T>& to, LinearSizes z) {
  const int64_t L = z.length(), K = z.k(), V = z.v(), W = std::max(K, V);
  const auto work = [&](int64_t part) {
    const int64_t b = part / z.heads, h = part % z.heads;
    Memory<T> memory(6 * L * K + 4 * L * V + 4 * L * L + 4 * K * V + 7 * L + W);
    T *q = memory.take(L * K), *k = memory.take(L * K), *kt = memory.take(K * L), *dq = memory.take(L * K);
    T *dk = memory.take(L * K), *x = memory.take(L * K);
    T *v = memory.take(L * V), *vt = memory.take(V * L), *d = memory.take(L * V), *dv = memory.take(L * V);
    T *p = memory.take(L * L), *dp = memory.take(L * L), *e = memory.take(L * L);
    T *s = memory.take(K * V), *st = memory.take(V * K), *ds = memory.take(K * V), *dst = memory.take(V * K);
    const Decays<T> empty{memory.take(L * L), memory.take(L), memory.take(L), memory.take(L), nullptr};
    T *after = memory.take(L), *before = memory.take(L), *sums = memory.take(L), *row = memory.take(W);
    load_matrix(r.dlast + part * z.keys * z.columns(), ds, z.keys, z.columns(), V);
    for (int64_t first = (z.chunks() - 1) * CHUNK; first >= 0; first -= CHUNK) {
      const int64_t n = std::min(CHUNK, z.steps - first);
      Decays<T> decays = empty;
      decays.g = in.decays(part, first, z);
      decays.fill(n, L);
      load_matrix(r.starts + (part * z.chunks() + first / CHUNK) * z.keys * z.columns(), s, z.keys, z.columns(), V);
      load_chunk(in.q, b, h, first, n, L, q, z.keys, K);
      load_chunk(in.k, b, h, first, n, L, k, z.keys, K);
      load_chunk(in.v, b, h, first, n, L, v, z.values, V, z.normalize);
      load_chunk(r.dout, b, h, first, n, L, d, z.values, V);
      if (z.normalize) undo_division(r, b, h, part, first, n, d, row, z, V);
      transpose(k, kt, L, K);
      transpose(v, vt, L, V);
      transpose(s, st, K, V);
      transpose(ds, dst, K, V);
      multiply<false, Part::LOWER_RESULT>(L, K, L, rows(q, K), kt, p);
      weigh(p, decays.w, n, L, z.strict);
      multiply<false, Part::LOWER_RESULT>(L, V, L, rows(d, V), vt, dp);
      for (int64_t i = 0; i < n; ++i)
#pragma omp simd
        for (int64_t j = 0; j < i; ++j) e[i * L + j] = dp[i * L + j] * p[i * L + j];
      weigh(dp, decays.w, n, L, z.strict);
      multiply<false>(L, V, K, rows(d, V), st, x);  // of the state before
      multiply<false, Part::LOWER_LEFT>(L, L, K, rows(dp, L), k, dq);
      for (int64_t i = 0; i < n; ++i) {
        const T a = decays.since[i];
        after[i] = a * dot(q + i * K, x + i * K, K);
#pragma omp simd
        for (int64_t c = 0; c < K; ++c) dq[i * K + c] += a * x[i * K + c];
        to.q.store(b, h, first + i, dq + i * K, z.keys);
      }
      multiply<false>(L, V, K, rows(v, V), dst, x);  // of the state after
      multiply<false, Part::UPPER_LEFT>(L, L, K, columns(dp, L), q, dk);
      for (int64_t i = 0; i < n; ++i) {
        const T a = decays.until[i];
        before[i] = a * dot(k + i * K, x + i * K, K);
#pragma omp simd
        for (int64_t c = 0; c < K; ++c) dk[i * K + c] += a * x[i * K + c];
        to.k.store(b, h, first + i, dk + i * K, z.keys);
      }
      const T kept = decays.since[n - 1];
      if (to.g != nullptr) {
        const T through = kept * dot(s, ds, K * V);
        decay_gradients(e, after, before, through, sums, to.g + part * z.steps + first, n, L);
      }
      multiply<false, Part::UPPER_LEFT>(L, L, V, columns(p, L), d, dv);
      scaled_rows(k, decays.until, k, n, K);
      multiply<true>(L, K, V, rows(k, K), ds, dv);
      for (int64_t i = 0; i < n; ++i) to.v.store(b, h, first + i, dv + i * V, z.values);
      scaled_rows(q, decays.since, q, n, K);
#pragma omp simd
      for (int64_t i = 0; i < K * V; ++i) ds[i] *= kept;
      multiply<true>(K, L, V, columns(q, K), d, ds);
    }
    store_matrix(ds, to.state + part * z.keys * z.columns(), z.keys, z.columns(), V);
  };
  each(z.batch * z.heads, work, z.keys * z.columns() * std::max<int64_t>(1, z.steps / 4));
}

inline Tensor with_rows_of_heads(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

// Time before heads in memory, as projections have it.
inline Tensor empty_heads(const Tensor& like, int64_t width, const at::TensorOptions& options) {
  return at::empty({like.size(0), like.size(2), like.size(1), width}, options).transpose(1, 2);
}

inline LinearSizes linear_sizes(const Tensor& q, const Tensor& v, bool strict, bool normalize) {
  return {v.size(0), v.size(1), v.size(2), q.size(3), v.size(3), strict, normalize};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                       const Maybe& log_decay, const Tensor& state,
                                                                       bool strict, bool normalize) {
  const Tensor x = with_rows_of_heads(q), y = with_rows_of_heads(k), u = with_rows_of_heads(v);
  const Tensor g = log_decay ? log_decay->contiguous() : Tensor(), start = state.contiguous();
  const LinearSizes z = linear_sizes(q, v, strict, normalize);
  Tensor out_ = empty_heads(v, z.values, start.options()), last = at::empty_like(start);
  Tensor starts = at::empty({z.batch, z.heads, z.chunks(), z.keys, z.columns()}, start.options());
  Tensor mass = at::empty({z.batch, z.heads, normalize ? z.steps : 0}, start.options());
  FLOATING(start, T,
           linear_forward<T>({heads_of<T>(x), heads_of<T>(y), heads_of<T>(u), in<T>(g), in<T>(start)},
                             heads_of<T>(out_), out<T>(last), out<T>(starts), out<T>(mass), z));
  return {out_, last, starts, mass};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward_cpu(
    const Tensor& dout, const Maybe& dlast, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& log_decay,
    const Tensor& state, const Tensor& out_, const Tensor& starts, const Tensor& mass, bool strict, bool normalize) {
  const Tensor x = with_rows_of_heads(q), y = with_rows_of_heads(k), u = with_rows_of_heads(v);
  const Tensor d = with_rows_of_heads(dout), o = with_rows_of_heads(out_);
  const Tensor g = log_decay ? log_decay->contiguous() : Tensor(), start = state.contiguous();
  const Tensor dl = or_zeros(dlast, start).contiguous(), kept = starts.contiguous(), sums = mass.contiguous();
  const LinearSizes z = linear_sizes(q, v, strict, normalize);
  Tensor dq = empty_heads(q, z.keys, q.options()), dk = empty_heads(k, z.keys, k.options());
  Tensor dv = empty_heads(v, z.values, v.options()), dstate = at::empty_like(start);
  Tensor dg = g.defined() ? at::empty_like(g) : at::empty({0}, start.options());
  FLOATING(start, T,
           linear_reverse<T>({heads_of<T>(x), heads_of<T>(y), heads_of<T>(u), in<T>(g), nullptr},
                             {heads_of<T>(d), heads_of<T>(o), in<T>(dl), in<T>(kept), in<T>(sums)},
                             {heads_of<T>(dq), heads_of<T>(dk), heads_of<T>(dv), g.defined() ? out<T>(dg) : nullptr,
                              out<T>(dstate)},
                             z));
  return {dq, dk, dv, dg, dstate};
}

struct LinearAttention : torch::autograd::Function<LinearAttention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Maybe& log_decay, const Tensor& state, bool strict, bool normalize) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("linear_attention", decltype(linear_attention_cpu));
    auto [y, last, starts, mass] = op.call(q, k, v, log_decay, state, strict, normalize);
    ctx->save_for_backward({q, k, v, defined(log_decay), state, y, starts, mass});
    ctx->saved_data["strict"] = strict;
    ctx->saved_data["normalize"] = normalize;
    ctx->mark_non_differentiable({starts, mass});
    ctx->set_materialize_grads(false);
    return {y, last, starts, mass};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("linear_attention_backward", decltype(linear_attention_backward_cpu));
    const auto s = ctx->get_saved_variables();
    const Maybe g = maybe(s[3]);
    auto [dq, dk, dv, dg, dstate] =
        op.call(or_zeros(grads[0], s[5]), maybe(grads[1]), s[0], s[1], s[2], g, s[4], s[5], s[6], s[7],
                ctx->saved_data["strict"].toBool(), ctx->saved_data["normalize"].toBool());
    return {dq, dk, dv, g ? dg : Tensor(), dstate, Tensor(), Tensor()};
  }
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention_autograd(const Tensor& q, const Tensor& k,
                                                                            const Tensor& v, const Maybe& log_decay,
                                                                            const Tensor& state, bool strict,
                                                                            bool normalize) {
  const auto y = LinearAttention::apply(q, k, v, log_decay, state, strict, normalize);
  return {y[0], y[1], y[2], y[3]};
}

}  // namespace helmholtz
