// Running softmax averages per channel (AFT), in units of the largest key so far. Floor: S + 1 numbers in, S + 1 out per
// step and channel forward; 2 S + 2 in, S + 1 out backward.
#pragma once

#include "scan.h"

namespace helmholtz {

// `top` is the running maximum; sums are S signals and, last, the weights. A reset forgets what is before it.
template <typename T>
void softmax_forward(const T* k, const T* x, const T* top0, const T* sums0, const bool* reset, T* y, T* top, T* inverse,
                     T* last, int64_t batch, int64_t steps, int64_t signals, int64_t width) {
  const int64_t blocks = (width + SCAN_BLOCK - 1) / SCAN_BLOCK;
  const T floor = std::numeric_limits<T>::lowest();  // finite: a row without any weight subtracts to 0, not to NaN
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, width - first);
    std::vector<T> sums((signals + 1) * SCAN_BLOCK);
    T m[SCAN_BLOCK], decay[SCAN_BLOCK], weight[SCAN_BLOCK];
    for (int64_t c = 0; c < n; ++c) m[c] = std::max(top0[row * width + first + c], floor);
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(sums0 + (row * (signals + 1) + s) * width + first, n, sums.data() + s * SCAN_BLOCK);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t step = row * steps + t, at = step * width + first;
      const bool fresh = reset != nullptr && reset[step];
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T key = std::max(k[at + c], floor), before = fresh ? floor : m[c];
        const T now = key > before ? key : before;
        decay[c] = fresh ? T(0) : exp_of(before - now);
        weight[c] = k[at + c] <= floor ? T(0) : exp_of(k[at + c] - now);
        m[c] = top[at + c] = now;
      }
      T* mass = sums.data() + signals * SCAN_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        mass[c] = mass[c] * decay[c] + weight[c];
        inverse[at + c] = mass[c] > T(0) ? T(1) / mass[c] : T(0);
      }
      for (int64_t s = 0; s < signals; ++s) {
        T* sum = sums.data() + s * SCAN_BLOCK;
        const int64_t of = (step * signals + s) * width + first;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          sum[c] = sum[c] * decay[c] + weight[c] * x[of + c];
          y[of + c] = sum[c] * inverse[at + c];
        }
      }
    }
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(sums.data() + s * SCAN_BLOCK, n, last + (row * (signals + 1) + s) * width + first);
  });
}

template <typename T>
void softmax_reverse(const T* dy, const T* dlast, const T* k, const T* x, const T* top0, const bool* reset, const T* y,
                     const T* top, const T* inverse, T* dk, T* dx, T* dsums0, int64_t batch, int64_t steps,
                     int64_t signals, int64_t width) {
  const int64_t blocks = (width + SCAN_BLOCK - 1) / SCAN_BLOCK;
  const T floor = std::numeric_limits<T>::lowest();
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, width - first);
    std::vector<T> carry((signals + 1) * SCAN_BLOCK);
    T weight[SCAN_BLOCK], decay[SCAN_BLOCK], total[SCAN_BLOCK];
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(dlast + (row * (signals + 1) + s) * width + first, n, carry.data() + s * SCAN_BLOCK);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t step = row * steps + t, at = step * width + first;
      const bool fresh = reset != nullptr && reset[step];
      const T* before = t > 0 ? top + at - width : top0 + row * width + first;
      T* mass = carry.data() + signals * SCAN_BLOCK;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        weight[c] = k[at + c] <= floor ? T(0) : exp_of(k[at + c] - top[at + c]);
        decay[c] = fresh ? T(0) : exp_of(std::max(before[c], floor) - top[at + c]);
        total[c] = 0;
      }
      for (int64_t s = 0; s < signals; ++s) {
        T* sum = carry.data() + s * SCAN_BLOCK;
        const int64_t of = (step * signals + s) * width + first;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          const T g = dy[of + c] * inverse[at + c];
          sum[c] += g;
          mass[c] -= g * y[of + c];
          dx[of + c] = sum[c] * weight[c];
          total[c] += sum[c] * x[of + c];
          sum[c] *= decay[c];
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        dk[at + c] = (total[c] + mass[c]) * weight[c];
        mass[c] *= decay[c];
      }
    }
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(carry.data() + s * SCAN_BLOCK, n, dsums0 + (row * (signals + 1) + s) * width + first);
  });
}

// averaged, last sums, running maximum, 1 / sum of the weights
inline std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_softmax_cpu(const Tensor& k, const Tensor& x, const Tensor& top0,
                                                                  const Tensor& sums0, const Maybe& reset) {
  const Tensor key = k.contiguous(), u = x.contiguous(), m = top0.contiguous(), start = sums0.contiguous();
  const Tensor fresh = reset ? reset->contiguous() : Tensor();
  Tensor y = at::empty_like(u), top = at::empty_like(key), inverse = at::empty_like(key), last = at::empty_like(start);
  FLOATING(u, T, softmax_forward<T>(in<T>(key), in<T>(u), in<T>(m), in<T>(start), in<bool>(fresh), out<T>(y),
                                    out<T>(top), out<T>(inverse), out<T>(last), u.size(0), u.size(1), u.size(2),
                                    u.size(3)));
  return {y, last, top, inverse};
}

inline std::tuple<Tensor, Tensor, Tensor> rnn_softmax_backward_cpu(const Tensor& dy, const Tensor& dlast,
                                                                   const Tensor& k, const Tensor& x, const Tensor& top0,
                                                                   const Maybe& reset, const Tensor& y,
                                                                   const Tensor& top, const Tensor& inverse) {
  const Tensor g = dy.contiguous(), carry = dlast.contiguous(), key = k.contiguous(), u = x.contiguous();
  const Tensor m = top0.contiguous(), fresh = reset ? reset->contiguous() : Tensor();
  Tensor dk = at::empty_like(key), dx = at::empty_like(u), dsums = at::empty_like(carry);
  FLOATING(u, T, softmax_reverse<T>(in<T>(g), in<T>(carry), in<T>(key), in<T>(u), in<T>(m), in<bool>(fresh), in<T>(y),
                                    in<T>(top), in<T>(inverse), out<T>(dk), out<T>(dx), out<T>(dsums), u.size(0),
                                    u.size(1), u.size(2), u.size(3)));
  return {dk, dx, dsums};
}

struct RNNSoftmax : torch::autograd::Function<RNNSoftmax> {
  static variable_list forward(AutogradContext* ctx, const Tensor& k, const Tensor& x, const Tensor& top0,
                               const Tensor& sums0, const Maybe& reset) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("rnn_softmax", decltype(rnn_softmax_cpu));
    auto [y, last, top, inverse] = op.call(k, x, top0, sums0, reset);
    ctx->save_for_backward({k, x, top0, defined(reset), y, top, inverse});
    ctx->mark_non_differentiable({top, inverse});
    return {y, last, top, inverse};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("rnn_softmax_backward", decltype(rnn_softmax_backward_cpu));
    const auto s = ctx->get_saved_variables();
    const Maybe reset = s[3].defined() ? Maybe(s[3]) : std::nullopt;
    const Tensor dlast = grads[1].defined()
                             ? grads[1]
                             : at::zeros({s[1].size(0), s[1].size(2) + 1, s[1].size(3)}, s[1].options());
    auto [dk, dx, dsums] = op.call(or_zeros(grads[0], s[4]), dlast, s[0], s[1], s[2], reset, s[4], s[5], s[6]);
    return {dk, dx, Tensor(), dsums, Tensor()};
  }
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_softmax_autograd(const Tensor& k, const Tensor& x,
                                                                       const Tensor& top0, const Tensor& sums0,
                                                                       const Maybe& reset) {
  const auto y = RNNSoftmax::apply(k, x, top0, sums0, reset);
  return {y[0], y[1], y[2], y[3]};
}

}  // namespace helmholtz
