// The selective scan: N states for each of S signals per channel, decays shared by the signals. Floor: T C N exponentials
// and 4 T C N S operations forward; backward computes the states of 32 steps again and does 3 times as much.
#pragma once

#include "scan.h"

namespace helmholtz {

constexpr int64_t KEPT = 32;  // steps from one state that is kept to the next

struct ScanSizes {
  int64_t batch, steps, signals, width, states;
  int64_t blocks() const { return (width + SCAN_BLOCK - 1) / SCAN_BLOCK; }
  int64_t chunks() const { return (steps + KEPT - 1) / KEPT; }
};

inline ScanSizes sizes_of(const Tensor& u, const Tensor& A) {
  return {u.size(0), u.size(1), u.size(2), u.size(3), A.size(1)};
}

// A block of channels at one time: what every step reads.
template <typename T>
struct ScanInputs {
  const T *u, *delta, *rates, *b, *c;
  const bool* reset;
};

// rates of a block, states first: N x SCAN_BLOCK
template <typename T>
void load_rates(const T* rates, T* to, int64_t first, int64_t n, int64_t states) {
  for (int64_t j = 0; j < states; ++j)
    for (int64_t c = 0; c < n; ++c) to[j * SCAN_BLOCK + c] = rates[(first + c) * states + j];
}

// h and decays after one step; `h` is N x S x SCAN_BLOCK.
template <typename T>
INLINE void step_states(const ScanInputs<T>& x, const ScanSizes& z, const T* rates, int64_t step, int64_t first,
                        int64_t n, const T* before, T* h, T* decay) {
  const bool fresh = x.reset != nullptr && x.reset[step];
  const T* delta = x.delta + step * z.width + first;
  for (int64_t j = 0; j < z.states; ++j) {
    T* a = decay + j * SCAN_BLOCK;
    const T write = x.b[step * z.states + j];
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) a[c] = fresh ? T(0) : exp_of(delta[c] * rates[j * SCAN_BLOCK + c]);
    for (int64_t s = 0; s < z.signals; ++s) {
      const T* u = x.u + (step * z.signals + s) * z.width + first;
      const int64_t at = (j * z.signals + s) * SCAN_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) h[at + c] = a[c] * before[at + c] + delta[c] * u[c] * write;
    }
  }
}

template <typename T>
void selective_forward(ScanInputs<T> x, const T* start, T* y, T* last, T* kept, ScanSizes z) {
  const int64_t block = z.states * z.signals * SCAN_BLOCK;
  each(z.batch * z.blocks(), [&](int64_t part) {
    const int64_t row = part / z.blocks(), first = part % z.blocks() * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, z.width - first);
    std::vector<T> h(block, 0), rates(z.states * SCAN_BLOCK, 0), decay(z.states * SCAN_BLOCK, 0);
    load_rates(x.rates, rates.data(), first, n, z.states);
    for (int64_t s = 0; s < z.signals; ++s)
      for (int64_t c = 0; c < n; ++c)
        for (int64_t j = 0; j < z.states; ++j)
          h[(j * z.signals + s) * SCAN_BLOCK + c] = start[((row * z.signals + s) * z.width + first + c) * z.states + j];
    for (int64_t t = 0; t < z.steps; ++t) {
      const int64_t step = row * z.steps + t;
      if (t % KEPT == 0) std::copy_n(h.data(), block, kept + (part * z.chunks() + t / KEPT) * block);
      step_states(x, z, rates.data(), step, first, n, h.data(), h.data(), decay.data());
      for (int64_t s = 0; s < z.signals; ++s) {
        T* to = y + (step * z.signals + s) * z.width + first;
        std::fill_n(to, n, T(0));
        for (int64_t j = 0; j < z.states; ++j) {
          const T read = x.c[step * z.states + j];
          const T* state = h.data() + (j * z.signals + s) * SCAN_BLOCK;
#pragma omp simd
          for (int64_t c = 0; c < n; ++c) to[c] += read * state[c];
        }
      }
    }
    for (int64_t s = 0; s < z.signals; ++s)
      for (int64_t c = 0; c < n; ++c)
        for (int64_t j = 0; j < z.states; ++j)
          last[((row * z.signals + s) * z.width + first + c) * z.states + j] = h[(j * z.signals + s) * SCAN_BLOCK + c];
  }, z.steps * block * 4);
}

template <typename T>
struct ScanGradients {
  T *u, *delta, *rates, *b, *c, *start;  // rates: B C N; b, c: blocks B T N, summed by the caller
};

// One step backward: `dh` comes from the step after and leaves for the step before.
template <typename T>
INLINE void step_back(const ScanInputs<T>& x, const ScanSizes& z, const T* rates, const T* dy, int64_t step,
                      int64_t first, int64_t n, const T* before, const T* h, const T* decay, T* dh, T* dscaled,
                      T* drates, const ScanGradients<T>& to, int64_t sums) {
  const T* delta = x.delta + step * z.width + first;
  T* ddelta = to.delta + step * z.width + first;
  std::fill_n(dscaled, z.signals * SCAN_BLOCK, T(0));
  std::fill_n(ddelta, n, T(0));
  for (int64_t j = 0; j < z.states; ++j) {
    const T read = x.c[step * z.states + j], write = x.b[step * z.states + j];
    const T* a = decay + j * SCAN_BLOCK;
    T exponent[SCAN_BLOCK] = {}, dread = 0, dwrite = 0;
    for (int64_t s = 0; s < z.signals; ++s) {
      const int64_t at = (j * z.signals + s) * SCAN_BLOCK, of = (step * z.signals + s) * z.width + first;
      T* scaled = dscaled + s * SCAN_BLOCK;
#pragma omp simd reduction(+ : dread, dwrite)
      for (int64_t c = 0; c < n; ++c) {
        const T d = dh[at + c] + dy[of + c] * read;
        dread += dy[of + c] * h[at + c];
        dwrite += d * delta[c] * x.u[of + c];
        scaled[c] += write * d;
        exponent[c] += d * before[at + c];
        dh[at + c] = d * a[c];
      }
    }
    to.b[sums + j] = dwrite;
    to.c[sums + j] = dread;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const T e = exponent[c] * a[c];
      drates[j * SCAN_BLOCK + c] += e * delta[c];
      ddelta[c] += e * rates[j * SCAN_BLOCK + c];
    }
  }
  for (int64_t s = 0; s < z.signals; ++s) {
    const int64_t of = (step * z.signals + s) * z.width + first;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      to.u[of + c] = dscaled[s * SCAN_BLOCK + c] * delta[c];
      ddelta[c] += dscaled[s * SCAN_BLOCK + c] * x.u[of + c];
    }
  }
}

template <typename T>
void selective_reverse(ScanInputs<T> x, const T* kept, const T* dy, const T* dlast, ScanGradients<T> to, ScanSizes z) {
  const int64_t block = z.states * z.signals * SCAN_BLOCK, rate_block = z.states * SCAN_BLOCK;
  each(z.batch * z.blocks(), [&](int64_t part) {
    const int64_t row = part / z.blocks(), number = part % z.blocks(), first = number * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, z.width - first);
    std::vector<T> h((KEPT + 1) * block, 0), decay(KEPT * rate_block, 0), dh(block, 0), drates(rate_block, 0);
    std::vector<T> rates(rate_block, 0), dscaled(z.signals * SCAN_BLOCK);
    load_rates(x.rates, rates.data(), first, n, z.states);
    for (int64_t s = 0; s < z.signals; ++s)
      for (int64_t c = 0; c < n; ++c)
        for (int64_t j = 0; j < z.states; ++j)
          dh[(j * z.signals + s) * SCAN_BLOCK + c] = dlast[((row * z.signals + s) * z.width + first + c) * z.states + j];
    for (int64_t chunk = z.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * KEPT, count = std::min(KEPT, z.steps - begin);
      std::copy_n(kept + (part * z.chunks() + chunk) * block, block, h.data());
      for (int64_t i = 0; i < count; ++i)
        step_states(x, z, rates.data(), row * z.steps + begin + i, first, n, h.data() + i * block,
                    h.data() + (i + 1) * block, decay.data() + i * rate_block);
      for (int64_t i = count - 1; i >= 0; --i) {
        const int64_t step = row * z.steps + begin + i;
        step_back(x, z, rates.data(), dy, step, first, n, h.data() + i * block, h.data() + (i + 1) * block,
                  decay.data() + i * rate_block, dh.data(), dscaled.data(), drates.data(), to,
                  (number * z.batch * z.steps + step) * z.states);
      }
    }
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < z.states; ++j) {
        to.rates[(row * z.width + first + c) * z.states + j] = drates[j * SCAN_BLOCK + c];
        for (int64_t s = 0; s < z.signals; ++s)
          to.start[((row * z.signals + s) * z.width + first + c) * z.states + j] =
              dh[(j * z.signals + s) * SCAN_BLOCK + c];
      }
  });
}

// y, last state, states that are kept
inline std::tuple<Tensor, Tensor, Tensor> selective_scan_cpu(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                             const Tensor& B, const Tensor& C, const Tensor& state,
                                                             const Maybe& reset) {
  const Tensor x = u.contiguous(), d = delta.contiguous(), r = A.contiguous(), b = B.contiguous(), c = C.contiguous();
  const Tensor start = state.contiguous(), fresh = reset ? reset->contiguous() : Tensor();
  const ScanSizes z = sizes_of(x, r);
  Tensor y = at::empty_like(x), last = at::empty_like(start);
  Tensor kept = at::empty({z.batch * z.blocks(), z.chunks(), z.states * z.signals * SCAN_BLOCK}, x.options());
  FLOATING(x, T, selective_forward<T>({in<T>(x), in<T>(d), in<T>(r), in<T>(b), in<T>(c), in<bool>(fresh)}, in<T>(start),
                                      out<T>(y), out<T>(last), out<T>(kept), z));
  return {y, last, kept};
}

// `state` is not read, the first that is kept is a copy: it is here so that who asks for a second derivative is told.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward_cpu(
    const Tensor& dy, const Tensor& dlast, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const Tensor& state, const Maybe& reset, const Tensor& kept) {
  const Tensor g = dy.contiguous(), gl = dlast.contiguous(), x = u.contiguous(), d = delta.contiguous();
  const Tensor r = A.contiguous(), b = B.contiguous(), c = C.contiguous();
  const Tensor fresh = reset ? reset->contiguous() : Tensor();
  const ScanSizes z = sizes_of(x, r);
  Tensor du = at::empty_like(x), ddelta = at::empty_like(d), dstart = at::empty_like(gl);
  Tensor drates = at::empty({z.batch, z.width, z.states}, x.options());
  Tensor db = at::empty({z.blocks(), z.batch, z.steps, z.states}, x.options()), dc = at::empty_like(db);
  FLOATING(x, T, selective_reverse<T>({in<T>(x), in<T>(d), in<T>(r), in<T>(b), in<T>(c), in<bool>(fresh)}, in<T>(kept),
                                      in<T>(g), in<T>(gl),
                                      {out<T>(du), out<T>(ddelta), out<T>(drates), out<T>(db), out<T>(dc),
                                       out<T>(dstart)},
                                      z));
  return {du, ddelta, drates.sum(0), db.sum(0), dc.sum(0), dstart};
}

struct SelectiveScan : torch::autograd::Function<SelectiveScan> {
  static variable_list forward(AutogradContext* ctx, const Tensor& u, const Tensor& delta, const Tensor& A,
                               const Tensor& B, const Tensor& C, const Tensor& state, const Maybe& reset) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("selective_scan", decltype(selective_scan_cpu));
    auto [y, last, kept] = op.call(u, delta, A, B, C, state, reset);
    ctx->save_for_backward({u, delta, A, B, C, defined(reset), kept, state});
    ctx->mark_non_differentiable({kept});
    return {y, last, kept};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("selective_scan_backward", decltype(selective_scan_backward_cpu));
    const auto s = ctx->get_saved_variables();
    const Maybe reset = s[5].defined() ? Maybe(s[5]) : std::nullopt;
    auto [du, ddelta, dA, dB, dC, dstart] = op.call(or_zeros(grads[0], s[0]), or_zeros(grads[1], s[7]), s[0], s[1], s[2],
                                                    s[3], s[4], s[7], reset, s[6]);
    return {du, ddelta, dA, dB, dC, dstart, Tensor()};
  }
};

inline std::tuple<Tensor, Tensor, Tensor> selective_scan_autograd(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                                  const Tensor& B, const Tensor& C, const Tensor& state,
                                                                  const Maybe& reset) {
  const auto y = SelectiveScan::apply(u, delta, A, B, C, state, reset);
  return {y[0], y[1], y[2]};
}

}  // namespace helmholtz
