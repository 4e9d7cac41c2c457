// The selective scan: N states for each of S signals per channel, decays shared by the signals. With `normalize` a signal
// of ones is one more, by whose result the others are divided. Floor: T C N exponentials and 4 T C N S operations
// forward; backward computes the states of 32 steps again and does 3 times as much.
#pragma once

#include "scan.h"

namespace helmholtz {

constexpr int64_t KEPT = 32;  // steps from one state that is kept to the next

struct ScanSizes {
  int64_t batch, steps, given, heads, width, states;  // given: signals without that of ones
  bool normalize;
  int64_t signals() const { return given + normalize; }
  int64_t channels() const { return heads * width; }
  int64_t blocks() const { return (channels() + SCAN_BLOCK - 1) / SCAN_BLOCK; }
  int64_t chunks() const { return (steps + KEPT - 1) / KEPT; }
  int64_t block_states() const { return states * signals() * SCAN_BLOCK; }
};

// Signals B T S H V, channels (h, v): each head's are side by side, all else lies anywhere.
template <typename S>
struct Signals {
  S* data;
  int64_t b, t, s, h;
};
template <typename S>
Signals<S> signals_of(const Tensor& x) {
  return {const_cast<S*>(x.const_data_ptr<S>()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// A block of channels: where each lies from the first signal of a token on.
struct Places {
  Places(int64_t first, int64_t count, int64_t width, int64_t apart) : n(count) {
    for (int64_t c = 0; c < n; ++c) at[c] = (first + c) / width * apart + (first + c) % width;
    together = at[n - 1] - at[0] == n - 1;
  }
  template <typename S, typename T>
  void load(const S* from, T* to) const {
    if (together) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) to[c] = wide(from[at[0] + c]);
    } else {
      for (int64_t c = 0; c < n; ++c) to[c] = wide(from[at[c]]);
    }
  }
  template <typename S, typename T>
  void store(const T* from, S* to) const {
    if (together) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) to[at[0] + c] = narrow<S>(from[c]);
    } else {
      for (int64_t c = 0; c < n; ++c) to[at[c]] = narrow<S>(from[c]);
    }
  }
  int64_t n, at[SCAN_BLOCK] = {};
  bool together;
};

template <typename S, typename T>
struct ScanInputs {
  Signals<S> u;
  const T *delta, *rates, *b, *c, *skip;  // skip: C or null
  const bool* reset;
};

// What a block of channels reads in a chunk, whole vectors of it: signals, step sizes.
template <typename S, typename T>
void load_steps(const ScanInputs<S, T>& in, const ScanSizes& z, const Places& of, int64_t row, int64_t begin,
                int64_t count, int64_t first, T* u, T* delta) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t s = 0; s < z.signals(); ++s) {
      T* to = u + (i * z.signals() + s) * SCAN_BLOCK;
      if (s < z.given)
        of.load(in.u.data + row * in.u.b + (begin + i) * in.u.t + s * in.u.s, to);
      else
        std::fill_n(to, SCAN_BLOCK, T(1));
    }
    std::copy_n(in.delta + (row * z.steps + begin + i) * z.channels() + first, of.n, delta + i * SCAN_BLOCK);
  }
}

// rates of a block, states first: N x SCAN_BLOCK
template <typename T>
void load_rates(const T* rates, T* to, int64_t first, int64_t n, int64_t states) {
  for (int64_t j = 0; j < states; ++j)
    for (int64_t c = 0; c < n; ++c) to[j * SCAN_BLOCK + c] = rates[(first + c) * states + j];
}

// States of a block, N x S x SCAN_BLOCK, from or to those of a row, S x C x N.
template <typename T, typename F>
void each_state(const ScanSizes& z, int64_t row, int64_t first, int64_t n, const F& move) {
  for (int64_t s = 0; s < z.signals(); ++s)
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < z.states; ++j)
        move((j * z.signals() + s) * SCAN_BLOCK + c, ((row * z.signals() + s) * z.channels() + first + c) * z.states + j);
}

// h and decays after one step.
template <int64_t FIXED, typename T>
INLINE void step_states(const T* u, const T* delta, const T* rates, const T* b, bool fresh, const T* before, T* h,
                        T* decay, int64_t states, int64_t given) {
  const int64_t signals = FIXED ? FIXED : given;
  for (int64_t j = 0; j < states; ++j) {
    T *a = decay + j * SCAN_BLOCK, added[SCAN_BLOCK];
#pragma omp simd
    for (int64_t c = 0; c < SCAN_BLOCK; ++c) {
      a[c] = fresh ? T(0) : exp_of(delta[c] * rates[j * SCAN_BLOCK + c]);
      added[c] = delta[c] * b[j];
    }
    for (int64_t s = 0; s < signals; ++s) {
      const int64_t at = (j * signals + s) * SCAN_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < SCAN_BLOCK; ++c) h[at + c] = a[c] * before[at + c] + added[c] * u[s * SCAN_BLOCK + c];
    }
  }
}

// What a step reads: S x SCAN_BLOCK.
template <int64_t FIXED, typename T>
INLINE void read_states(const T* h, const T* read, const T* u, const T* skip, T* y, int64_t states, int64_t given) {
  const int64_t signals = FIXED ? FIXED : given;
  for (int64_t s = 0; s < signals; ++s) {
    T sum[SCAN_BLOCK];
#pragma omp simd
    for (int64_t c = 0; c < SCAN_BLOCK; ++c) sum[c] = skip[c] * u[s * SCAN_BLOCK + c];
    for (int64_t j = 0; j < states; ++j) {
      const T* state = h + (j * signals + s) * SCAN_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < SCAN_BLOCK; ++c) sum[c] += read[j] * state[c];
    }
    std::copy_n(sum, SCAN_BLOCK, y + s * SCAN_BLOCK);
  }
}

template <int64_t FIXED, typename S, typename T>
void selective_forward(const ScanInputs<S, T>& in, const T* start, const Signals<T>& y, T* last, T* kept, T* mass,
                       ScanSizes z) {
  const int64_t block = z.block_states(), wide_row = z.signals() * SCAN_BLOCK;
  const auto work = [&](int64_t part) {
    const int64_t row = part / z.blocks(), first = part % z.blocks() * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, z.channels() - first);
    const Places of(first, n, z.width, in.u.h), to(first, n, z.width, y.h);
    std::vector<T> h(block, 0), rates(z.states * SCAN_BLOCK, 0), decay(z.states * SCAN_BLOCK, 0);
    std::vector<T> u(KEPT * wide_row, 0), delta(KEPT * SCAN_BLOCK, 0), sums(wide_row);
    T skip[SCAN_BLOCK] = {};
    if (in.skip != nullptr) std::copy_n(in.skip + first, n, skip);
    load_rates(in.rates, rates.data(), first, n, z.states);
    each_state<T>(z, row, first, n, [&](int64_t i, int64_t j) { h[i] = start[j]; });
    for (int64_t begin = 0; begin < z.steps; begin += KEPT) {
      const int64_t count = std::min(KEPT, z.steps - begin);
      std::copy_n(h.data(), block, kept + (part * z.chunks() + begin / KEPT) * block);
      load_steps(in, z, of, row, begin, count, first, u.data(), delta.data());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t step = row * z.steps + begin + i;
        const T* signals = u.data() + i * wide_row;
        step_states<FIXED>(signals, delta.data() + i * SCAN_BLOCK, rates.data(), in.b + step * z.states,
                           in.reset != nullptr && in.reset[step], h.data(), h.data(), decay.data(), z.states,
                           z.signals());
        read_states<FIXED>(h.data(), in.c + step * z.states, signals, skip, sums.data(), z.states, z.signals());
        if (z.normalize) {
          const T* total = sums.data() + z.given * SCAN_BLOCK;
          std::copy_n(total, n, mass + step * z.channels() + first);
          for (int64_t s = 0; s < z.given; ++s)
#pragma omp simd
            for (int64_t c = 0; c < SCAN_BLOCK; ++c) sums[s * SCAN_BLOCK + c] /= total[c];
        }
        for (int64_t s = 0; s < z.given; ++s)
          to.store(sums.data() + s * SCAN_BLOCK, y.data + row * y.b + (begin + i) * y.t + s * y.s);
      }
    }
    each_state<T>(z, row, first, n, [&](int64_t i, int64_t j) { last[j] = h[i]; });
  };
  each(z.batch * z.blocks(), work, z.steps * block * 4);
}

template <typename S, typename T>
struct ScanGradients {
  Signals<S> u;
  T *delta, *rates, *b, *c, *skip, *start;  // rates: B C N, skip: B C; b, c: blocks B T N; summed by the caller
};

// One step backward: `dh` comes from the step after and leaves for the step before; `scaled` holds du / delta.
template <int64_t FIXED, typename T>
INLINE void step_back(const T* u, const T* delta, const T* rates, const T* b, const T* read, const T* dy, const T* before,
                      const T* h, const T* decay, T* dh, T* scaled, T* ddelta, T* drates, T* db, T* dread,
                      int64_t states, int64_t given) {
  const int64_t signals = FIXED ? FIXED : given;
  std::fill_n(scaled, signals * SCAN_BLOCK, T(0));
  std::fill_n(ddelta, SCAN_BLOCK, T(0));
  for (int64_t j = 0; j < states; ++j) {
    const T* a = decay + j * SCAN_BLOCK;
    T exponent[SCAN_BLOCK] = {}, reads[SCAN_BLOCK] = {}, writes[SCAN_BLOCK] = {}, of_read = 0, of_write = 0;
    for (int64_t s = 0; s < signals; ++s) {
      const int64_t at = (j * signals + s) * SCAN_BLOCK;
      const T *g = dy + s * SCAN_BLOCK, *x = u + s * SCAN_BLOCK;
      T* sum = scaled + s * SCAN_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < SCAN_BLOCK; ++c) {
        const T d = dh[at + c] + g[c] * read[j];
        reads[c] += g[c] * h[at + c];
        writes[c] += d * x[c];
        sum[c] += b[j] * d;
        exponent[c] += d * before[at + c];
        dh[at + c] = d * a[c];
      }
    }
#pragma omp simd reduction(+ : of_read, of_write)
    for (int64_t c = 0; c < SCAN_BLOCK; ++c) {
      const T e = exponent[c] * a[c];
      drates[j * SCAN_BLOCK + c] += e * delta[c];
      ddelta[c] += e * rates[j * SCAN_BLOCK + c];
      of_read += reads[c];
      of_write += writes[c] * delta[c];
    }
    db[j] = of_write;
    dread[j] = of_read;
  }
}

// The gradient of every signal's sum in a chunk; of quotients by the last, if they were divided.
template <typename T>
void load_gradients(const Signals<const T>& dy, const Signals<const T>& y, const T* mass, const ScanSizes& z,
                    const Places& of, const Places& read, int64_t row, int64_t begin, int64_t count, int64_t first,
                    T* to) {
  T quotient[SCAN_BLOCK] = {}, by[SCAN_BLOCK] = {};
  for (int64_t i = 0; i < count; ++i) {
    T *g = to + i * z.signals() * SCAN_BLOCK, *of_mass = g + z.given * SCAN_BLOCK;
    if (z.normalize) {
      const T* total = mass + (row * z.steps + begin + i) * z.channels() + first;
      for (int64_t c = 0; c < of.n; ++c) by[c] = T(1) / total[c];
      std::fill_n(of_mass, SCAN_BLOCK, T(0));
    }
    for (int64_t s = 0; s < z.given; ++s, g += SCAN_BLOCK) {
      of.load(dy.data + row * dy.b + (begin + i) * dy.t + s * dy.s, g);
      if (!z.normalize) continue;
      read.load(y.data + row * y.b + (begin + i) * y.t + s * y.s, quotient);
#pragma omp simd
      for (int64_t c = 0; c < SCAN_BLOCK; ++c) {
        g[c] *= by[c];
        of_mass[c] -= g[c] * quotient[c];
      }
    }
  }
}

template <int64_t FIXED, typename S, typename T>
void selective_reverse(const ScanInputs<S, T>& in, const T* kept, const Signals<const T>& y, const T* mass,
                       const Signals<const T>& dy, const T* dlast, const ScanGradients<S, T>& to, ScanSizes z) {
  const int64_t block = z.block_states(), rate_block = z.states * SCAN_BLOCK, wide_row = z.signals() * SCAN_BLOCK;
  const auto work = [&](int64_t part) {
    const int64_t row = part / z.blocks(), number = part % z.blocks(), first = number * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, z.channels() - first);
    const Places of(first, n, z.width, in.u.h), of_y(first, n, z.width, y.h), of_dy(first, n, z.width, dy.h);
    const Places of_du(first, n, z.width, to.u.h);
    std::vector<T> h((KEPT + 1) * block, 0), decay(KEPT * rate_block, 0), dh(block, 0), drates(rate_block, 0);
    std::vector<T> u(KEPT * wide_row, 0), delta(KEPT * SCAN_BLOCK, 0), g(KEPT * wide_row, 0);
    std::vector<T> rates(rate_block, 0), scaled(wide_row);
    T skip[SCAN_BLOCK] = {}, dskip[SCAN_BLOCK] = {}, ddelta[SCAN_BLOCK];
    if (in.skip != nullptr) std::copy_n(in.skip + first, n, skip);
    load_rates(in.rates, rates.data(), first, n, z.states);
    each_state<T>(z, row, first, n, [&](int64_t i, int64_t j) { dh[i] = dlast[j]; });
    for (int64_t chunk = z.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * KEPT, count = std::min(KEPT, z.steps - begin);
      std::copy_n(kept + (part * z.chunks() + chunk) * block, block, h.data());
      load_steps(in, z, of, row, begin, count, first, u.data(), delta.data());
      load_gradients(dy, y, mass, z, of_dy, of_y, row, begin, count, first, g.data());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t step = row * z.steps + begin + i;
        step_states<FIXED>(u.data() + i * wide_row, delta.data() + i * SCAN_BLOCK, rates.data(), in.b + step * z.states,
                           in.reset != nullptr && in.reset[step], h.data() + i * block, h.data() + (i + 1) * block,
                           decay.data() + i * rate_block, z.states, z.signals());
      }
      for (int64_t i = count - 1; i >= 0; --i) {
        const int64_t step = row * z.steps + begin + i, sums = (number * z.batch * z.steps + step) * z.states;
        const T *signals = u.data() + i * wide_row, *size = delta.data() + i * SCAN_BLOCK, *dsum = g.data() + i * wide_row;
        step_back<FIXED>(signals, size, rates.data(), in.b + step * z.states, in.c + step * z.states, dsum,
                         h.data() + i * block, h.data() + (i + 1) * block, decay.data() + i * rate_block, dh.data(),
                         scaled.data(), ddelta, drates.data(), to.b + sums, to.c + sums, z.states, z.signals());
        for (int64_t s = 0; s < z.signals(); ++s) {
          T* d = scaled.data() + s * SCAN_BLOCK;
          const T *x = signals + s * SCAN_BLOCK, *of_sum = dsum + s * SCAN_BLOCK;
#pragma omp simd
          for (int64_t c = 0; c < SCAN_BLOCK; ++c) {
            ddelta[c] += d[c] * x[c];
            dskip[c] += of_sum[c] * x[c];
            d[c] = d[c] * size[c] + skip[c] * of_sum[c];
          }
          if (s < z.given) of_du.store(d, to.u.data + row * to.u.b + (begin + i) * to.u.t + s * to.u.s);
        }
        std::copy_n(ddelta, n, to.delta + step * z.channels() + first);
      }
    }
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < z.states; ++j)
        to.rates[(row * z.channels() + first + c) * z.states + j] = drates[j * SCAN_BLOCK + c];
    std::copy_n(dskip, n, to.skip + row * z.channels() + first);
    each_state<T>(z, row, first, n, [&](int64_t i, int64_t j) { to.start[j] = dh[i]; });
  };
  each(z.batch * z.blocks(), work, z.steps * block * 4);
}

inline Tensor with_whole_heads(const Tensor& x) { return x.stride(4) == 1 || x.size(4) == 1 ? x : x.contiguous(); }

// B T S H V in the order B T H S V, as the other side of a mixer reads them.
inline Tensor empty_signals(const Tensor& u, const at::TensorOptions& options) {
  return at::empty({u.size(0), u.size(1), u.size(3), u.size(2), u.size(4)}, options).transpose(2, 3);
}

inline ScanSizes scan_sizes(const Tensor& u, const Tensor& A, bool normalize) {
  return {u.size(0), u.size(1), u.size(2), u.size(3), u.size(4), A.size(1), normalize};
}

// The number of signals as a constant where it is a common one: 1, or 2 and the ones.
#define SIGNALS(count, FIXED, ...)         \
  if ((count) == 1) {                      \
    constexpr int64_t FIXED = 1;           \
    __VA_ARGS__;                           \
  } else if ((count) == 3) {               \
    constexpr int64_t FIXED = 3;           \
    __VA_ARGS__;                           \
  } else {                                 \
    constexpr int64_t FIXED = 0;           \
    __VA_ARGS__;                           \
  }

inline std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_cpu(const Tensor& u, const Tensor& delta,
                                                                     const Tensor& A, const Tensor& B, const Tensor& C,
                                                                     const Maybe& D, const Tensor& state,
                                                                     const Maybe& reset, bool normalize) {
  const Tensor x = with_whole_heads(u), d = delta.contiguous(), r = A.contiguous(), b = B.contiguous();
  const Tensor c = C.contiguous(), skip = D ? D->contiguous() : Tensor(), start = state.contiguous();
  const Tensor fresh = reset ? reset->contiguous() : Tensor();
  const ScanSizes z = scan_sizes(x, r, normalize);
  Tensor y = empty_signals(x, d.options()), last = at::empty_like(start);
  Tensor kept = at::empty({z.batch * z.blocks(), z.chunks(), z.block_states()}, d.options());
  Tensor mass = at::empty({z.batch, normalize ? z.steps : 0, z.channels()}, d.options());
  STORED(x, S, using T = at::opmath_type<S>; SIGNALS(z.signals(), FIXED,
         selective_forward<FIXED, S, T>({signals_of<S>(x), in<T>(d), in<T>(r), in<T>(b), in<T>(c), in<T>(skip),
                                         in<bool>(fresh)},
                                        in<T>(start), signals_of<T>(y), out<T>(last), out<T>(kept), out<T>(mass), z)));
  return {y, last, kept, mass};
}

// `state` is not read, the first that is kept is a copy: it is here so that who asks for a second derivative is told.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward_cpu(
    const Tensor& dy, const Maybe& dlast, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const Maybe& D, const Tensor& state, const Maybe& reset, const Tensor& y, const Tensor& kept,
    const Tensor& mass, bool normalize) {
  const Tensor g = with_whole_heads(dy), x = with_whole_heads(u), d = delta.contiguous();
  const Tensor gl = or_zeros(dlast, state).contiguous();
  const Tensor r = A.contiguous(), b = B.contiguous(), c = C.contiguous(), skip = D ? D->contiguous() : Tensor();
  const Tensor fresh = reset ? reset->contiguous() : Tensor(), read = with_whole_heads(y);
  const ScanSizes z = scan_sizes(x, r, normalize);
  Tensor du = empty_signals(x, x.options()), ddelta = at::empty_like(d), dstart = at::empty_like(gl);
  Tensor drates = at::empty({z.batch, z.channels(), z.states}, d.options());
  Tensor dskip = at::empty({z.batch, z.channels()}, d.options());
  Tensor db = at::empty({z.blocks(), z.batch, z.steps, z.states}, d.options()), dc = at::empty_like(db);
  STORED(x, S, using T = at::opmath_type<S>; SIGNALS(z.signals(), FIXED,
         selective_reverse<FIXED, S, T>({signals_of<S>(x), in<T>(d), in<T>(r), in<T>(b), in<T>(c), in<T>(skip),
                                         in<bool>(fresh)},
                                        in<T>(kept), signals_of<const T>(read), in<T>(mass), signals_of<const T>(g),
                                        in<T>(gl),
                                        {signals_of<S>(du), out<T>(ddelta), out<T>(drates), out<T>(db), out<T>(dc),
                                         out<T>(dskip), out<T>(dstart)},
                                        z)));
  return {du, ddelta, drates.sum(0), db.sum(0), dc.sum(0), D ? dskip.sum(0) : at::empty({0}, d.options()), dstart};
}

struct SelectiveScan : torch::autograd::Function<SelectiveScan> {
  static variable_list forward(AutogradContext* ctx, const Tensor& u, const Tensor& delta, const Tensor& A,
                               const Tensor& B, const Tensor& C, const Maybe& D, const Tensor& state, const Maybe& reset,
                               bool normalize) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("selective_scan", decltype(selective_scan_cpu));
    auto [y, last, kept, mass] = op.call(u, delta, A, B, C, D, state, reset, normalize);
    ctx->save_for_backward({u, delta, A, B, C, defined(D), state, defined(reset), y, kept, mass});
    ctx->saved_data["normalize"] = normalize;
    ctx->mark_non_differentiable({kept, mass});
    ctx->set_materialize_grads(false);
    return {y, last, kept, mass};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("selective_scan_backward", decltype(selective_scan_backward_cpu));
    const auto s = ctx->get_saved_variables();
    const Maybe D = maybe(s[5]), reset = maybe(s[7]);
    auto [du, ddelta, dA, dB, dC, dD, dstart] =
        op.call(or_zeros(grads[0], s[8]), maybe(grads[1]), s[0], s[1], s[2], s[3], s[4], D, s[6], reset, s[8],
                s[9], s[10], ctx->saved_data["normalize"].toBool());
    return {du, ddelta, dA, dB, dC, D ? dD : Tensor(), dstart, Tensor(), Tensor()};
  }
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_autograd(const Tensor& u, const Tensor& delta,
                                                                          const Tensor& A, const Tensor& B,
                                                                          const Tensor& C, const Maybe& D,
                                                                          const Tensor& state, const Maybe& reset,
                                                                          bool normalize) {
  const auto y = SelectiveScan::apply(u, delta, A, B, C, D, state, reset, normalize);
  return {y[0], y[1], y[2], y[3]};
}

}  // namespace helmholtz
