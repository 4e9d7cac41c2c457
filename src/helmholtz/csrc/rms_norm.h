// Division by the root mean square and a weight per channel. Floor: 1 number in and 1 out forward, 2 in and 1 out backward.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t NORM_ROWS = 32;  // vectors of a piece of work

// Returns 1 / rms.
template <typename S, typename T>
INLINE T norm_row(const S* x, const T* weight, T eps, S* y, int64_t width) {
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < width; ++c) squares += wide(x[c]) * wide(x[c]);
  const T scale = T(1) / std::sqrt(squares / T(width) + eps);
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) y[c] = narrow<S>(wide(x[c]) * scale * weight[c]);
  return scale;
}

template <typename S, typename T>
INLINE void norm_row_backward(const S* dy, const S* x, const T* weight, T scale, S* dx, T* dweight, int64_t width) {
  T along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t c = 0; c < width; ++c) {
    const T product = wide(dy[c]) * wide(x[c]);
    along += product * weight[c];
    dweight[c] += product * scale;
  }
  const T back = along * scale * scale / T(width);
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) dx[c] = narrow<S>((wide(dy[c]) * weight[c] - wide(x[c]) * back) * scale);
}

template <typename S, typename T = at::opmath_type<S>>
void norm_all(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& scales) {
  const int64_t width = x.size(-1), rows = scales.numel();
  const S* from = in<S>(x);
  const T* w = in<T>(weight);
  S* to = out<S>(y);
  T* scale = out<T>(scales);
  each((rows + NORM_ROWS - 1) / NORM_ROWS, [&](int64_t part) {
    for (int64_t row = part * NORM_ROWS, end = std::min(row + NORM_ROWS, rows); row < end; ++row)
      scale[row] = norm_row<S, T>(from + row * width, w, T(eps), to + row * width, width);
  }, std::min(NORM_ROWS, rows) * width);
}

// dweights: a row per piece of work
template <typename S, typename T = at::opmath_type<S>>
void norm_all_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& dx,
                       const Tensor& dweights) {
  const int64_t width = x.size(-1), rows = scales.numel();
  const S *g = in<S>(dy), *from = in<S>(x);
  const T *w = in<T>(weight), *scale = in<T>(scales);
  S* to = out<S>(dx);
  T* sums = out<T>(dweights);
  each(dweights.size(0), [&](int64_t part) {
    for (int64_t row = part * NORM_ROWS, end = std::min(row + NORM_ROWS, rows); row < end; ++row)
      norm_row_backward<S, T>(g + row * width, from + row * width, w, scale[row], to + row * width, sums + part * width,
                              width);
  });
}

// the result, and 1 / rms of each vector
inline std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor from = x.contiguous(), w = weight.contiguous();
  Tensor y = at::empty_like(from), scales = at::empty(x.sizes().slice(0, x.dim() - 1), w.options());
  STORED(from, S, norm_all<S>(from, w, eps, y, scales));
  return {y, scales};
}

inline std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                        const Tensor& scales) {
  const Tensor g = dy.contiguous(), from = x.contiguous(), w = weight.contiguous();
  Tensor dx = at::empty_like(from);
  Tensor sums = at::zeros({(scales.numel() + NORM_ROWS - 1) / NORM_ROWS, w.size(0)}, w.options());
  STORED(from, S, norm_all_backward<S>(g, from, w, scales, dx, sums));
  return {dx, sums.sum(0)};
}

struct RMSNorm : torch::autograd::Function<RMSNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("rms_norm", decltype(rms_norm_cpu));
    auto [y, scales] = op.call(x, weight, eps);
    ctx->save_for_backward({x, weight, scales});
    ctx->mark_non_differentiable({scales});
    return {y, scales};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("rms_norm_backward", decltype(rms_norm_backward_cpu));
    const auto s = ctx->get_saved_variables();
    auto [dx, dweight] = op.call(or_zeros(grads[0], s[0]), s[0], s[1], s[2]);
    return {dx, dweight, Tensor()};
  }
};

inline std::tuple<Tensor, Tensor> rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps) {
  auto both = RMSNorm::apply(x, weight, eps);
  return {both[0], both[1]};
}

}  // namespace helmholtz
