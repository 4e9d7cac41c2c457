// w_ij = exp(sum of g_s over j < s <= i) between the L steps of a chunk, 0 above the diagonal. Floor: L^2 numbers out
// forward, twice as many in backward.
#pragma once

#include "common.h"

namespace helmholtz {

template <typename T>
void decays_forward(const T* g, T* w, int64_t rows, int64_t length) {
  each(rows, [&](int64_t row) {
    std::vector<T> sums(length, 0);
    for (int64_t i = 0; i < length; ++i) {
      T* to = w + (row * length + i) * length;
      const T here = g[row * length + i];
#pragma omp simd
      for (int64_t j = 0; j < i; ++j) {
        sums[j] += here;
        to[j] = exp_of(sums[j]);
      }
      to[i] = T(1);
      std::fill(to + i + 1, to + length, T(0));
    }
  });
}

// A step's gradient sums the pairs on both sides of it: i from it on, j before it.
template <typename T>
void decays_reverse(const T* dw, const T* w, T* dg, int64_t rows, int64_t length) {
  each(rows, [&](int64_t row) {
    std::vector<T> columns(length, 0);
    for (int64_t s = length - 1; s >= 0; --s) {
      const int64_t at = (row * length + s) * length;
      T total = 0;
      for (int64_t j = 0; j < s; ++j) columns[j] += dw[at + j] * w[at + j];
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < s; ++j) total += columns[j];
      dg[row * length + s] = total;
    }
  });
}

inline Tensor segment_decays_cpu(const Tensor& log_decay) {
  const Tensor g = log_decay.contiguous();
  const int64_t length = g.size(-1);
  std::vector<int64_t> shape = g.sizes().vec();
  shape.push_back(length);
  Tensor w = at::empty(shape, g.options());
  FLOATING(g, T, decays_forward<T>(in<T>(g), out<T>(w), g.numel() / std::max<int64_t>(length, 1), length));
  return w;
}

inline Tensor segment_decays_backward_cpu(const Tensor& dw, const Tensor& w) {
  const Tensor d = dw.contiguous();
  const int64_t length = w.size(-1);
  Tensor dg = at::empty(w.sizes().slice(0, w.dim() - 1), w.options());
  FLOATING(w, T, decays_reverse<T>(in<T>(d), in<T>(w), out<T>(dg), dg.numel() / std::max<int64_t>(length, 1), length));
  return dg;
}

struct SegmentDecays : torch::autograd::Function<SegmentDecays> {
  static Tensor forward(AutogradContext* ctx, const Tensor& log_decay) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("segment_decays", decltype(segment_decays_cpu));
    const Tensor w = op.call(log_decay);
    ctx->save_for_backward({w});
    return w;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("segment_decays_backward", decltype(segment_decays_backward_cpu));
    return {op.call(grads[0], ctx->get_saved_variables()[0])};
  }
};

inline Tensor segment_decays_autograd(const Tensor& log_decay) {
  return SegmentDecays::apply(log_decay);
}

}  // namespace helmholtz
