// A step of a stream for the priors whose state has a fixed size, from the projected features to the averages, in one pass
// over the state and without a gradient: it makes one call of what a sequence makes in a dozen, each of them longer than
// its work. Floor: the state once in and once out.
#pragma once

#include "linear_attention.h"
#include "rnn_softmax.h"
#include "rope.h"
#include "tilt.h"

namespace helmholtz {

constexpr int64_t STEP_CHANNELS = 32;  // of the selective scan, a piece of work

// A token's features, B 1 C, each channel side by side.
template <typename S>
const S* token(const Tensor& x, int64_t b) {
  return x.defined() ? x.const_data_ptr<S>() + b * x.stride(0) : nullptr;
}

// cos and sin of a token, or nothing to turn by.
template <typename T>
struct Angles {
  Tensor cos, sin;
  Angles(const Maybe& c, const Maybe& s) : cos(table(c)), sin(table(s)) {}
  static Tensor table(const Maybe& x) {
    return x ? x->to(c10::CppTypeToScalarType<T>::value).contiguous() : Tensor();
  }
  // `heads` of `width` numbers, turned.
  template <typename S>
  void turned(const S* x, int64_t b, int64_t heads, int64_t width, T* to) const {
    for (int64_t c = 0; c < heads * width; ++c) to[c] = wide(x[c]);
    if (!cos.defined()) return;
    const int64_t at = cos.dim() == 3 && cos.size(0) > 1 ? b * width : 0, half = width / 2;
    const T *c = in<T>(cos) + at, *s = in<T>(sin) + at;
    for (int64_t h = 0; h < heads; ++h, to += width)
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const T x = to[i], y = to[i + half];
        to[i] = x * c[i] - y * s[i + half];
        to[i + half] = y * c[i] + x * s[i + half];
      }
  }
};

// The values of heads first ... first + count - 1 and, with `beta`, their exponentials behind them.
template <typename S, typename T>
void signals_of_step(const Tensor& v, const T* beta, T cap, int64_t b, int64_t first, int64_t count, T* to) {
  const int64_t V = v.size(3), n = count * V;
  const Rows<const S> from{v.const_data_ptr<S>() + first * v.stride(1), v.stride(0), v.stride(2), v.stride(1)};
  wide_heads(from, b, 0, {count, V}, to);
  if (beta == nullptr) return;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[n + c] = exp_of(clip(beta[first * V + c] * to[c], cap));
}

// B H 1 N V, time before heads in memory.
inline Tensor averages_of_step(const Tensor& v, bool tilted, const at::TensorOptions& options) {
  return at::empty({v.size(0), 1, v.size(1), tilted ? 2 : 1, v.size(3)}, options).transpose(1, 2);
}

// Channels (head, value) of signal s among those averages.
template <typename T>
void store_signal(const T* from, int64_t b, int64_t s, HeadSizes heads, int64_t signals, T* averages) {
  for (int64_t h = 0; h < heads.count; ++h)
    std::copy_n(from + h * heads.width, heads.width, averages + ((b * heads.count + h) * signals + s) * heads.width);
}

// q, k B 1 (H K) before the feature map relu + eps; decay B 1 H or B 1 (H K): e^{-softplus(-decay) / temperature}.
template <typename S, typename T>
void linear_step_all(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, const Tensor& beta,
                     const Angles<T>& angles, const Tensor& state, const Tensor& mixed, const Tensor& last, T eps, T cap,
                     T temperature) {
  const int64_t heads = state.size(1), K = state.size(2), columns = state.size(3);
  const int64_t rates = decay.defined() ? decay.size(2) / heads : 0;
  const T *start = in<T>(state), *rate = in<T>(beta);
  T *all = out<T>(mixed), *next = out<T>(last);
  each(q.size(0) * heads, [&](int64_t part) {
    const int64_t b = part / heads, h = part % heads;
    std::vector<T> memory(3 * K + 2 * columns);
    T *read = memory.data(), *write = read + K, *kept = write + K, *u = kept + K, *sums = u + columns;
    angles.turned(token<S>(q, b) + h * K, b, 1, K, read);
    angles.turned(token<S>(k, b) + h * K, b, 1, K, write);
#pragma omp simd
    for (int64_t i = 0; i < K; ++i) {
      read[i] = (read[i] < T(0) ? T(0) : read[i]) + eps;  // NaN stays
      write[i] = (write[i] < T(0) ? T(0) : write[i]) + eps;
      kept[i] = T(1);
    }
    if (rates > 0) {
      const S* raw = token<S>(decay, b) + h * rates;
      for (int64_t i = 0; i < K; ++i) kept[i] = rates > 1 || i == 0 ? exp_of(-softplus_of(-wide(raw[i])) / temperature) : kept[0];
    }
    signals_of_step<S>(v, rate, cap, b, h, 1, u);
    u[columns - 1] = T(1);
    std::fill_n(sums, columns, T(0));
    const T* from = start + part * K * columns;
    T* to = next + part * K * columns;
    for (int64_t i = 0; i < K; ++i, from += columns, to += columns)
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        to[c] = kept[i] * from[c] + write[i] * u[c];
        sums[c] += read[i] * to[c];
      }
    const T mass = sums[columns - 1], by = mass > T(0) ? T(1) / mass : T(1);
#pragma omp simd
    for (int64_t c = 0; c < columns - 1; ++c) all[part * (columns - 1) + c] = sums[c] * by;
  }, K * columns / 8);
}

inline std::tuple<Tensor, Tensor> linear_step_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& decay,
                                                  const Maybe& beta, const Maybe& cos, const Maybe& sin,
                                                  const Tensor& state, double eps, double cap, double temperature) {
  const Tensor x = with_whole_rows(q), y = with_whole_rows(k), u = with_whole_rows(v), start = state.contiguous();
  const Tensor g = with_whole_rows(defined(decay)), rate = beta ? beta->contiguous() : Tensor();
  Tensor mixed = averages_of_step(v, rate.defined(), start.options()), last = at::empty_like(start);
  COMPUTED(start, x.scalar_type(), T, S,
           linear_step_all<S, T>(x, y, u, g, rate, Angles<T>(cos, sin), start, mixed, last, T(eps), T(cap),
                                 T(temperature)));
  return {mixed, last};
}

// k B 1 C before it is turned, one weight per channel of the values.
template <typename S, typename T>
void rnn_softmax_step_all(const Tensor& k, const Tensor& v, const Tensor& beta, const Angles<T>& angles,
                          const Tensor& max, const Tensor& sums, const Tensor& mixed, const Tensor& top,
                          const Tensor& last, T cap) {
  const HeadSizes heads{v.size(1), v.size(3)};
  const int64_t n = heads.channels(), signals = mixed.size(3);
  const T floor = std::numeric_limits<T>::lowest();
  for (int64_t b = 0; b < k.size(0); ++b) {
    std::vector<T> memory((signals + 4) * n);
    T *key = memory.data(), *decay = key + n, *weight = decay + n, *inverse = weight + n, *u = inverse + n;
    angles.turned(token<S>(k, b), b, heads.count, heads.width, key);
    signals_of_step<S>(v, in<T>(beta), cap, b, 0, heads.count, u);
    const T *before = in<T>(max) + b * n, *from = in<T>(sums) + b * (signals + 1) * n;
    T *after = out<T>(top) + b * n, *to = out<T>(last) + b * (signals + 1) * n;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const T x = key[c] < floor ? floor : key[c], m = before[c] < floor ? floor : before[c];  // NaN stays
      weigh(x, m, false, floor, decay[c], weight[c]);
      const T most = x > m ? x : m, mass = from[signals * n + c] * decay[c] + weight[c];
      after[c] = most > floor ? most : T(-INFINITY);
      to[signals * n + c] = mass;
      inverse[c] = mass > T(0) ? T(1) / mass : T(0);
    }
    for (int64_t s = 0; s < signals; ++s, u += n) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T sum = from[s * n + c] * decay[c] + weight[c] * u[c];
        to[s * n + c] = sum;
        u[c] = sum * inverse[c];
      }
      store_signal(u, b, s, heads, signals, out<T>(mixed));
    }
  }
}

inline std::tuple<Tensor, Tensor, Tensor> rnn_softmax_step_cpu(const Tensor& k, const Tensor& v, const Maybe& beta,
                                                               const Maybe& cos, const Maybe& sin, const Tensor& max,
                                                               const Tensor& sums, double cap) {
  const Tensor x = with_whole_rows(k), u = with_whole_rows(v), m = max.contiguous(), start = sums.contiguous();
  const Tensor rate = beta ? beta->contiguous() : Tensor();
  Tensor mixed = averages_of_step(v, rate.defined(), start.options()), top = at::empty_like(m);
  Tensor last = at::empty_like(start);
  COMPUTED(start, x.scalar_type(), T, S,
           rnn_softmax_step_all<S, T>(x, u, rate, Angles<T>(cos, sin), m, start, mixed, top, last, T(cap)));
  return {mixed, top, last};
}

// A channel's states of one signal after the step, and what is read of them.
template <typename T>
INLINE T step_signal(const T* from, const T* decay, const T* write, const T* read, T u, T* to, int64_t states) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < states; ++j) {
    to[j] = decay[j] * from[j] + write[j] * u;
    sum += read[j] * to[j];
  }
  return sum;
}

// delta B 1 C, b and c B 1 N, rates C N and skip C: all before what makes them positive.
template <typename S, typename T>
void selective_step_all(const Tensor& v, const Tensor& delta, const Tensor& b_in, const Tensor& c_in, const Tensor& rates,
                        const Tensor& skip, const Tensor& beta, const Tensor& state, const Tensor& mixed,
                        const Tensor& last, T eps, T cap) {
  const HeadSizes heads{v.size(1), v.size(3)};
  const int64_t n = heads.channels(), N = rates.size(1), signals = mixed.size(3), blocks = (n + STEP_CHANNELS - 1) / STEP_CHANNELS;
  const T *rate = in<T>(rates), *direct = in<T>(skip), *start = in<T>(state);
  T *next = out<T>(last), *all = out<T>(mixed);
  for (int64_t b = 0; b < v.size(0); ++b) {
    std::vector<T> memory(2 * N + (signals + 2) * n);
    T *write = memory.data(), *read = write + N, *u = read + N, *step = u + signals * n, *through = step + n;
    const S *raw_b = token<S>(b_in, b), *raw_c = token<S>(c_in, b), *raw = token<S>(delta, b);
#pragma omp simd
    for (int64_t j = 0; j < N; ++j) {
      write[j] = softplus_of(wide(raw_b[j])) + eps;
      read[j] = softplus_of(wide(raw_c[j])) + eps;
    }
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      step[c] = sigmoid_of(-wide(raw[c]));
      through[c] = softplus_of(direct[c]);
    }
    signals_of_step<S>(v, in<T>(beta), cap, b, 0, heads.count, u);
    each(blocks, [&](int64_t block) {
      std::vector<T> factors(2 * N);
      T *kept = factors.data(), *added = kept + N;
      for (int64_t c = block * STEP_CHANNELS; c < std::min((block + 1) * STEP_CHANNELS, n); ++c) {
#pragma omp simd
        for (int64_t j = 0; j < N; ++j) {
          kept[j] = exp_of(-step[c] * softplus_of(rate[c * N + j]));
          added[j] = step[c] * write[j];
        }
        const auto of = [&](int64_t s) { return ((b * (signals + 1) + s) * n + c) * N; };
        const T mass = step_signal(start + of(signals), kept, added, read, T(1), next + of(signals), N) + through[c];
        for (int64_t s = 0; s < signals; ++s) {
          const T value = u[s * n + c];
          u[s * n + c] = (step_signal(start + of(s), kept, added, read, value, next + of(s), N) + through[c] * value) / mass;
        }
      }
    }, STEP_CHANNELS * N * signals);
    for (int64_t s = 0; s < signals; ++s) store_signal(u + s * n, b, s, heads, signals, all);
  }
}

inline std::tuple<Tensor, Tensor> selective_step_cpu(const Tensor& v, const Tensor& delta, const Tensor& b,
                                                     const Tensor& c, const Tensor& rates, const Tensor& skip,
                                                     const Maybe& beta, const Tensor& state, double eps, double cap) {
  const Tensor u = with_whole_rows(v), d = with_whole_rows(delta), x = with_whole_rows(b), y = with_whole_rows(c);
  const Tensor start = state.contiguous(), r = rates.contiguous(), D = skip.contiguous();
  const Tensor rate = beta ? beta->contiguous() : Tensor();
  Tensor mixed = averages_of_step(v, rate.defined(), start.options()), last = at::empty_like(start);
  COMPUTED(start, u.scalar_type(), T, S,
           selective_step_all<S, T>(u, d, x, y, r, D, rate, start, mixed, last, T(eps), T(cap)));
  return {mixed, last};
}

// Heads B 1 (H K), turned: B H 1 K of each.
inline std::vector<Tensor> rope_step_cpu(at::TensorList features, const Tensor& cos, const Tensor& sin) {
  const int64_t width = cos.size(-1);
  std::vector<Tensor> turned;
  for (const Tensor& x : features) {
    const Tensor from = with_whole_rows(x);
    const HeadSizes heads{x.size(2) / width, width};
    turned.push_back(at::empty({x.size(0), heads.count, 1, width}, x.options()));
    STORED(x, S, using T = at::opmath_type<S>; const Angles<T> angles(cos, sin); std::vector<T> row(heads.channels());
           for (int64_t b = 0; b < x.size(0); ++b) {
             angles.turned(token<S>(from, b), b, heads.count, width, row.data());
             narrow_heads<T, S>(row.data(), {out<S>(turned.back()), heads.channels(), 0, width}, b, 0, heads);
           });
  }
  return turned;
}

}  // namespace helmholtz
