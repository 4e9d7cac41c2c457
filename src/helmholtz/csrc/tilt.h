// The signals of a free-energy read, v and exp(clip(beta v)), a token with all its heads at a time. Floor: 1 number in
// and 2 out per channel forward; 3 in and 1 out backward, where the exponential is computed again.
#pragma once

#include "rows.h"

namespace helmholtz {

constexpr int64_t TILT_STEPS = 16;  // tokens of a piece of work

template <typename T>
INLINE T clip(T x, T cap) {
  return x > cap ? cap : x < -cap ? -cap : x;  // NaN stays
}

template <typename T, typename S>
void tilt_all(const Tensor& v, const Tensor& beta, double cap, const Tensor& signals) {
  const HeadSizes heads{v.size(2), v.size(3)};
  const int64_t steps = v.size(1), pieces = (steps + TILT_STEPS - 1) / TILT_STEPS, n = heads.channels();
  const auto from = rows_of<S>(v);
  const auto to_value = new_rows<T>(signals.select(3, 0)), to_tilt = new_rows<T>(signals.select(3, 1));
  const T *rate = in<T>(beta), most = T(cap);
  each(v.size(0) * pieces, [&](int64_t part) {
    std::vector<T> memory(2 * n);
    T *value = memory.data(), *tilt = value + n;
    const int64_t b = part / pieces, first = part % pieces * TILT_STEPS;
    for (int64_t t = first; t < std::min(first + TILT_STEPS, steps); ++t) {
      wide_heads(from, b, t, heads, value);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) tilt[c] = exp_of(clip(rate[c] * value[c], most));
      narrow_heads(value, to_value, b, t, heads);
      narrow_heads(tilt, to_tilt, b, t, heads);
    }
  });
}

template <typename T, typename S>
void tilt_all_backward(const Tensor& grad, const Tensor& v, const Tensor& beta, double cap, const Tensor& dv,
                       const Tensor& dbeta) {
  const HeadSizes heads{v.size(2), v.size(3)};
  const int64_t steps = v.size(1), pieces = (steps + TILT_STEPS - 1) / TILT_STEPS, n = heads.channels();
  const int64_t parts = v.size(0) * pieces;
  const auto from = rows_of<S>(v);
  const auto from_value = rows_of<T>(grad.select(3, 0)), from_tilt = rows_of<T>(grad.select(3, 1));
  const auto to = new_rows<S>(dv);
  const T *rate = in<T>(beta), most = T(cap);
  Tensor sums = at::zeros({parts, n}, beta.options());
  T* all = out<T>(sums);
  each(parts, [&](int64_t part) {
    std::vector<T> memory(3 * n);
    T *value = memory.data(), *d = value + n, *dtilt = d + n, *drate = all + part * n;
    const int64_t b = part / pieces, first = part % pieces * TILT_STEPS;
    for (int64_t t = first; t < std::min(first + TILT_STEPS, steps); ++t) {
      wide_heads(from, b, t, heads, value);
      wide_heads(from_value, b, t, heads, d);
      wide_heads(from_tilt, b, t, heads, dtilt);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T x = rate[c] * value[c], size = x < T(0) ? -x : x;
        const T dx = size < most ? dtilt[c] * exp_of(x) : T(0);
        drate[c] += dx * value[c];
        d[c] += dx * rate[c];
      }
      narrow_heads(d, to, b, t, heads);
    }
  });
  dbeta.copy_(sums.sum(0).view(dbeta.sizes()));
}

// v B G T V to signals B G T 2 V, in memory B T G 2 V, or B T 2 G V if `apart`.
inline Tensor tilt_cpu(const Tensor& v, const Tensor& beta, double cap, bool apart) {
  const Tensor x = with_whole_rows(v.transpose(1, 2)), rate = beta.contiguous();
  const int64_t b = x.size(0), t = x.size(1), g = x.size(2), n = x.size(3);
  Tensor signals = apart ? at::empty({b, t, 2, g, n}, rate.options()).transpose(2, 3)
                         : at::empty({b, t, g, 2, n}, rate.options());
  COMPUTED(rate, x.scalar_type(), T, S, tilt_all<T, S>(x, rate, cap, signals));
  return signals.transpose(1, 2);
}

inline std::tuple<Tensor, Tensor> tilt_backward_cpu(const Tensor& grad, const Tensor& v, const Tensor& beta,
                                                    double cap) {
  const Tensor x = with_whole_rows(v.transpose(1, 2)), rate = beta.contiguous();
  const Tensor g = with_whole_rows(grad.transpose(1, 2));
  Tensor dv = at::empty(x.sizes(), x.options()), dbeta = at::empty_like(rate);
  COMPUTED(rate, x.scalar_type(), T, S, tilt_all_backward<T, S>(g, x, rate, cap, dv, dbeta));
  return {dv.transpose(1, 2), dbeta};
}

struct TiltValues : torch::autograd::Function<TiltValues> {
  static Tensor forward(AutogradContext* ctx, const Tensor& v, const Tensor& beta, double cap, bool apart) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("tilt", decltype(tilt_cpu));
    ctx->save_for_backward({v, beta});
    ctx->saved_data["cap"] = cap;
    return op.call(v, beta, cap, apart);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("tilt_backward", decltype(tilt_backward_cpu));
    const auto saved = ctx->get_saved_variables();
    auto [dv, dbeta] = op.call(grads[0], saved[0], saved[1], ctx->saved_data["cap"].toDouble());
    return {dv, dbeta, Tensor(), Tensor()};
  }
};

inline Tensor tilt_autograd(const Tensor& v, const Tensor& beta, double cap, bool apart) {
  return TiltValues::apply(v, beta, cap, apart);
}

}  // namespace helmholtz
