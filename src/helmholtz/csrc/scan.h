// h_t = a_t h_{t-1} + x_t, a block of channels after another. Floor: 3 numbers to and from memory per step and channel
// forward, 5 backward.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t SCAN_BLOCK = 16;

template <typename T>
void scan_forward(const T* a, const T* x, const T* start, T* h, T* last, int64_t batch, int64_t steps, int64_t width) {
  const int64_t blocks = (width + SCAN_BLOCK - 1) / SCAN_BLOCK;
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, width - first);
    T carry[SCAN_BLOCK];
    std::copy_n(start + row * width + first, n, carry);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (row * steps + t) * width + first;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) h[at + c] = carry[c] = a[at + c] * carry[c] + x[at + c];
    }
    std::copy_n(carry, n, last + row * width + first);
  }, steps * SCAN_BLOCK);
}

template <typename T>
void scan_reverse(const T* dh, const T* dlast, const T* a, const T* h, const T* start, T* da, T* dx, T* dstart,
                  int64_t batch, int64_t steps, int64_t width) {
  const int64_t blocks = (width + SCAN_BLOCK - 1) / SCAN_BLOCK;
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, width - first);
    T carry[SCAN_BLOCK];
    std::copy_n(dlast + row * width + first, n, carry);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t at = (row * steps + t) * width + first;
      const T* before = t > 0 ? h + at - width : start + row * width + first;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T d = dh[at + c] + carry[c];
        dx[at + c] = d;
        da[at + c] = d * before[c];
        carry[c] = d * a[at + c];
      }
    }
    std::copy_n(carry, n, dstart + row * width + first);
  });
}

inline std::tuple<Tensor, Tensor> scan_cpu(const Tensor& decay, const Tensor& x, const Tensor& state) {
  const Tensor a = decay.contiguous(), u = x.contiguous(), start = state.contiguous();
  Tensor h = at::empty_like(u), last = at::empty_like(start);
  FLOATING(u, T, scan_forward<T>(in<T>(a), in<T>(u), in<T>(start), out<T>(h), out<T>(last), u.size(0), u.size(1),
                                 u.size(2)));
  return {h, last};
}

inline std::tuple<Tensor, Tensor, Tensor> scan_backward_cpu(const Tensor& dh, const Tensor& dlast, const Tensor& decay,
                                                            const Tensor& h, const Tensor& state) {
  const Tensor g = dh.contiguous(), carry = dlast.contiguous(), a = decay.contiguous(), start = state.contiguous();
  Tensor da = at::empty_like(h), dx = at::empty_like(h), dstart = at::empty_like(start);
  FLOATING(h, T, scan_reverse<T>(in<T>(g), in<T>(carry), in<T>(a), in<T>(h), in<T>(start), out<T>(da), out<T>(dx),
                                 out<T>(dstart), h.size(0), h.size(1), h.size(2)));
  return {da, dx, dstart};
}

struct Scan : torch::autograd::Function<Scan> {
  static variable_list forward(AutogradContext* ctx, const Tensor& decay, const Tensor& x, const Tensor& state) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("scan", decltype(scan_cpu));
    auto [h, last] = op.call(decay, x, state);
    ctx->save_for_backward({decay, h, state});
    return {h, last};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("scan_backward", decltype(scan_backward_cpu));
    const auto saved = ctx->get_saved_variables();
    auto [da, dx, dstart] =
        op.call(or_zeros(grads[0], saved[1]), or_zeros(grads[1], saved[2]), saved[0], saved[1], saved[2]);
    return {da, dx, dstart};
  }
};

inline std::tuple<Tensor, Tensor> scan_autograd(const Tensor& decay, const Tensor& x, const Tensor& state) {
  const auto y = Scan::apply(decay, x, state);
  return {y[0], y[1]};
}

}  // namespace helmholtz
