// A filter over the last W real tokens of each channel, and SiLU of it if asked for: a block of channels after another,
// the window in a core's first cache. Floor: 1 number in and 1 out per token and channel forward, 2 in and 1 out backward;
// 2 W operations and an exponential forward, 6 W and an exponential backward.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t CONV_BLOCK = 128;

struct ConvSizes {
  int64_t batch, steps, width, taps;
  int64_t blocks() const { return (width + CONV_BLOCK - 1) / CONV_BLOCK; }
};

// W rows of a block of channels, the oldest first; the oldest gives its place to the next.
template <typename T>
struct Window {
  Window(int64_t taps) : rows(taps * CONV_BLOCK, T(0)), taps(taps) {}
  T* at(int64_t w) {
    const int64_t i = oldest + w;
    return rows.data() + (i < taps ? i : i - taps) * CONV_BLOCK;
  }
  void advance() { oldest = oldest + 1 < taps ? oldest + 1 : 0; }
  void clear() { std::fill(rows.begin(), rows.end(), T(0)); }
  std::vector<T> rows;
  int64_t taps, oldest = 0;
};

// What a block of channels reads. `x`, `dy` have rows of stride `x_row`, `dy_row`.
template <typename S, typename T>
struct ConvInputs {
  const S *x, *dy;
  int64_t x_batch, x_row, dy_batch, dy_row;
  const T *weight, *bias, *state, *dlast;
  const bool *mask, *reset;
  bool silu;
};

template <typename S>
bool is_pad(const S& in, int64_t step) {
  return in.mask != nullptr && !in.mask[step];
}
template <typename S>
bool is_start(const S& in, int64_t step) {
  return in.reset != nullptr && in.reset[step];
}

template <typename From, typename To>
INLINE void widen_row(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[c] = wide(from[c]);
}
template <typename From, typename To>
INLINE void narrow_row(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[c] = narrow<To>(from[c]);
}

// filters of a block, taps first
template <typename T>
std::vector<T> load_filters(const T* weight, const ConvSizes& z, int64_t first, int64_t n) {
  std::vector<T> rows(z.taps * CONV_BLOCK);
  for (int64_t c = 0; c < n; ++c)
    for (int64_t w = 0; w < z.taps; ++w) rows[w * CONV_BLOCK + c] = weight[(first + c) * z.taps + w];
  return rows;
}

template <typename T>
INLINE void filter(Window<T>& window, const T* rows, const T* bias, T* to, int64_t n) {
  std::copy_n(bias, n, to);
  for (int64_t w = 0; w < window.taps; ++w) {
    const T *seen = window.at(w), *row = rows + w * CONV_BLOCK;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] += seen[c] * row[c];
  }
}

template <typename S, typename T>
void conv_forward(const ConvInputs<S, T>& in, S* y, T* last, ConvSizes z) {
  each(z.batch * z.blocks(), [&](int64_t part) {
    const int64_t b = part / z.blocks(), first = part % z.blocks() * CONV_BLOCK, past = z.taps - 1;
    const int64_t n = std::min(CONV_BLOCK, z.width - first);
    const std::vector<T> rows = load_filters(in.weight, z, first, n);
    Window<T> window(z.taps);
    for (int64_t w = 0; w < past; ++w) widen_row(in.state + (b * past + w) * z.width + first, window.at(w), n);
    T sum[CONV_BLOCK];
    for (int64_t t = 0; t < z.steps; ++t) {
      S* to = y + (b * z.steps + t) * z.width + first;
      if (is_start(in, b * z.steps + t)) window.clear();
      if (is_pad(in, b * z.steps + t)) {
        std::fill_n(to, n, S(0));
        continue;
      }
      widen_row(in.x + b * in.x_batch + t * in.x_row + first, window.at(past), n);
      filter(window, rows.data(), in.bias + first, sum, n);
      if (in.silu) {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) sum[c] *= sigmoid_of(sum[c]);
      }
      narrow_row(sum, to, n);
      window.advance();
    }
    for (int64_t w = 0; w < past; ++w) std::copy_n(window.at(w), n, last + (b * past + w) * z.width + first);
  }, z.steps * CONV_BLOCK);
}

template <typename S, typename T>
struct ConvGradients {
  S* x;
  T *state, *filters;  // filters: B, W + 1, C: those of the weights and, last, of the bias, summed by the caller
};

// The gradient of a row of the window is whole when the row leaves it: `from[w]` is the token that it came from, -1 - w
// that of the state and NONE one that a start cut off.
template <typename S, typename T>
void conv_reverse(const ConvInputs<S, T>& in, const ConvGradients<S, T>& to, ConvSizes z) {
  constexpr int64_t NONE = INT64_MIN;
  each(z.batch * z.blocks(), [&](int64_t part) {
    const int64_t b = part / z.blocks(), first = part % z.blocks() * CONV_BLOCK, past = z.taps - 1;
    const int64_t n = std::min(CONV_BLOCK, z.width - first);
    const std::vector<T> rows = load_filters(in.weight, z, first, n);
    Window<T> window(z.taps), gradients(z.taps);
    std::vector<T> filters((z.taps + 1) * CONV_BLOCK, T(0));
    std::vector<int64_t> from(z.taps, NONE);
    T g[CONV_BLOCK];
    const auto leave = [&](int64_t w) {
      if (from[w] == NONE) return;
      if (from[w] >= 0)
        narrow_row(gradients.at(w), to.x + (b * z.steps + from[w]) * z.width + first, n);
      else
        std::copy_n(gradients.at(w), n, to.state + (b * past - 1 - from[w]) * z.width + first);
    };
    for (int64_t w = 0; w < past; ++w) {
      widen_row(in.state + (b * past + w) * z.width + first, window.at(w), n);
      from[w] = -1 - w;
    }
    for (int64_t t = 0; t < z.steps; ++t) {
      if (is_start(in, b * z.steps + t)) {
        for (int64_t w = 0; w < past; ++w) leave(w);
        std::fill(from.begin(), from.end(), NONE);
        window.clear();
      }
      if (is_pad(in, b * z.steps + t)) {
        std::fill_n(to.x + (b * z.steps + t) * z.width + first, n, S(0));
        continue;
      }
      widen_row(in.x + b * in.x_batch + t * in.x_row + first, window.at(past), n);
      std::fill_n(gradients.at(past), n, T(0));
      from[past] = t;
      const S* dy = in.dy + b * in.dy_batch + t * in.dy_row + first;
      if (in.silu) {
        filter(window, rows.data(), in.bias + first, g, n);
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          const T s = sigmoid_of(g[c]);
          g[c] = wide(dy[c]) * s * (T(1) + g[c] * (T(1) - s));
        }
      } else {
        widen_row(dy, g, n);
      }
      for (int64_t w = 0; w < z.taps; ++w) {
        const T *seen = window.at(w), *weight = rows.data() + w * CONV_BLOCK;
        T *grad = gradients.at(w), *filter = filters.data() + w * CONV_BLOCK;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          grad[c] += g[c] * weight[c];
          filter[c] += g[c] * seen[c];
        }
      }
      T* shift = filters.data() + z.taps * CONV_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) shift[c] += g[c];
      leave(0);
      std::copy(from.begin() + 1, from.end(), from.begin());
      window.advance();
      gradients.advance();
    }
    for (int64_t w = 0; w < past; ++w) {
      const T* dlast = in.dlast + (b * past + w) * z.width + first;
      T* grad = gradients.at(w);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) grad[c] += dlast[c];
      leave(w);
    }
    for (int64_t w = 0; w <= z.taps; ++w)
      std::copy_n(filters.data() + w * CONV_BLOCK, n, to.filters + (b * (z.taps + 1) + w) * z.width + first);
  }, z.steps * CONV_BLOCK);
}

inline Tensor with_rows(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

inline std::tuple<Tensor, Tensor> causal_conv_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  const Tensor& state, const Maybe& mask, const Maybe& reset, bool silu) {
  const Tensor u = with_rows(x), w = weight.contiguous(), shift = bias.contiguous(), start = state.contiguous();
  const Tensor real = mask ? mask->contiguous() : Tensor(), fresh = reset ? reset->contiguous() : Tensor();
  Tensor y = at::empty(u.sizes(), u.options()), last = at::empty_like(start);
  STORED(u, S, using T = at::opmath_type<S>;
         conv_forward<S, T>({in<S>(u), nullptr, u.stride(0), u.stride(1), 0, 0, in<T>(w), in<T>(shift), in<T>(start),
                             nullptr, in<bool>(real), in<bool>(fresh), silu},
                            out<S>(y), out<T>(last), {u.size(0), u.size(1), u.size(2), w.size(1)}));
  return {y, last};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_backward_cpu(const Tensor& dy, const Maybe& dlast,
                                                                           const Tensor& x, const Tensor& weight,
                                                                           const Tensor& bias, const Tensor& state,
                                                                           const Maybe& mask, const Maybe& reset,
                                                                           bool silu) {
  const Tensor u = with_rows(x), w = weight.contiguous(), shift = bias.contiguous(), start = state.contiguous();
  const Tensor g = with_rows(dy), gl = or_zeros(dlast, start).contiguous();
  const Tensor real = mask ? mask->contiguous() : Tensor(), fresh = reset ? reset->contiguous() : Tensor();
  const int64_t taps = w.size(1);
  Tensor dx = at::empty(u.sizes(), u.options()), dstate = at::empty_like(start);
  Tensor filters = at::empty({u.size(0), taps + 1, u.size(2)}, w.options());
  STORED(u, S, using T = at::opmath_type<S>;
         conv_reverse<S, T>({in<S>(u), in<S>(g), u.stride(0), u.stride(1), g.stride(0), g.stride(1), in<T>(w),
                             in<T>(shift), in<T>(start), in<T>(gl), in<bool>(real), in<bool>(fresh), silu},
                            {out<S>(dx), out<T>(dstate), out<T>(filters)}, {u.size(0), u.size(1), u.size(2), taps}));
  const Tensor sums = filters.sum(0);
  return {dx, sums.narrow(0, 0, taps).t().contiguous(), sums.select(0, taps).clone(), dstate};
}

struct CausalConv : torch::autograd::Function<CausalConv> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Tensor& state, const Maybe& mask, const Maybe& reset, bool silu) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("causal_conv", decltype(causal_conv_cpu));
    auto [y, last] = op.call(x, weight, bias, state, mask, reset, silu);
    ctx->save_for_backward({x, weight, bias, state, defined(mask), defined(reset)});
    ctx->saved_data["silu"] = silu;
    ctx->set_materialize_grads(false);
    return {y, last};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("causal_conv_backward", decltype(causal_conv_backward_cpu));
    const auto s = ctx->get_saved_variables();
    auto [dx, dweight, dbias, dstate] = op.call(or_zeros(grads[0], s[0]), maybe(grads[1]), s[0], s[1], s[2], s[3],
                                                maybe(s[4]), maybe(s[5]), ctx->saved_data["silu"].toBool());
    return {dx, dweight, dbias, dstate, Tensor(), Tensor(), Tensor()};
  }
};

inline std::tuple<Tensor, Tensor> causal_conv_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                       const Tensor& state, const Maybe& mask, const Maybe& reset,
                                                       bool silu) {
  const auto y = CausalConv::apply(x, weight, bias, state, mask, reset, silu);
  return {y[0], y[1]};
}

}  // namespace helmholtz
