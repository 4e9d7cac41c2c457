// Running softmax averages per channel (AFT), in units of the largest key so far. Floor: S + 1 numbers in, S + 1 out per
// step and channel forward; 2 S + 2 in, S + 1 out backward; keys and their gradients may be bf16. Forward also writes the
// maximum and the mass of the weights, which backward reads.
#pragma once

#include "rows.h"

namespace helmholtz {

constexpr int64_t SOFTMAX_BLOCK = 64;  // channels of a piece: a whole step of fewer would be too short a run of memory

// What a step does to the sums before it, and the weight of what it adds. One of the two factors is 1, as the maximum is
// the key or what it was before, so they share an exponential. `floor` is finite: a row without any weight subtracts to
// 0 and not to NaN.
template <typename T>
INLINE void weigh(T key, T before, bool fresh, T floor, T& decay, T& weight) {
  const T from = fresh ? floor : before, e = exp_of(key > from ? from - key : key - from);
  decay = fresh ? T(0) : key > from ? e : T(1);
  weight = key <= floor ? T(0) : key > from ? T(1) : e;
}

// `top` is the running maximum; sums are S signals and, last, the weights. A reset forgets what is before it.
template <typename T, typename S>
void softmax_forward(const S* k, const T* x, const T* top0, const T* sums0, const bool* reset, T* y, T* top, T* inverse,
                     T* last, int64_t batch, int64_t steps, int64_t signals, int64_t width) {
  const int64_t blocks = (width + SOFTMAX_BLOCK - 1) / SOFTMAX_BLOCK;
  const T floor = std::numeric_limits<T>::lowest();
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SOFTMAX_BLOCK;
    const int64_t n = std::min(SOFTMAX_BLOCK, width - first);
    std::vector<T> sums((signals + 1) * SOFTMAX_BLOCK);
    T m[SOFTMAX_BLOCK], decay[SOFTMAX_BLOCK], weight[SOFTMAX_BLOCK], *mass = sums.data() + signals * SOFTMAX_BLOCK;
    for (int64_t c = 0; c < n; ++c) m[c] = std::max(top0[row * width + first + c], floor);
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(sums0 + (row * (signals + 1) + s) * width + first, n, sums.data() + s * SOFTMAX_BLOCK);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t step = row * steps + t, at = step * width + first;
      const bool fresh = reset != nullptr && reset[step];
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T raw = wide(k[at + c]), key = raw < floor ? floor : raw;  // NaN stays
        weigh(key, m[c], fresh, floor, decay[c], weight[c]);
        m[c] = top[at + c] = fresh || key > m[c] ? key : m[c];
        mass[c] = mass[c] * decay[c] + weight[c];
        inverse[at + c] = mass[c] > T(0) ? T(1) / mass[c] : T(0);
      }
      for (int64_t s = 0; s < signals; ++s) {
        T* sum = sums.data() + s * SOFTMAX_BLOCK;
        const int64_t of = (step * signals + s) * width + first;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          sum[c] = sum[c] * decay[c] + weight[c] * x[of + c];
          y[of + c] = sum[c] * inverse[at + c];
        }
      }
    }
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(sums.data() + s * SOFTMAX_BLOCK, n, last + (row * (signals + 1) + s) * width + first);
  }, steps * signals * SOFTMAX_BLOCK);
}

template <typename T, typename S>
void softmax_reverse(const T* dy, const T* dlast, const S* k, const T* x, const T* top0, const bool* reset, const T* y,
                     const T* top, const T* inverse, S* dk, T* dx, T* dsums0, int64_t batch, int64_t steps,
                     int64_t signals, int64_t width) {
  const int64_t blocks = (width + SOFTMAX_BLOCK - 1) / SOFTMAX_BLOCK;
  const T floor = std::numeric_limits<T>::lowest();
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SOFTMAX_BLOCK;
    const int64_t n = std::min(SOFTMAX_BLOCK, width - first);
    std::vector<T> carry((signals + 1) * SOFTMAX_BLOCK);
    T weight[SOFTMAX_BLOCK], decay[SOFTMAX_BLOCK], total[SOFTMAX_BLOCK];
    T* mass = carry.data() + signals * SOFTMAX_BLOCK;
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(dlast + (row * (signals + 1) + s) * width + first, n, carry.data() + s * SOFTMAX_BLOCK);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t step = row * steps + t, at = step * width + first;
      const bool fresh = reset != nullptr && reset[step];
      const T* before = t > 0 ? top + at - width : top0 + row * width + first;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T raw = wide(k[at + c]), key = raw < floor ? floor : raw;  // NaN stays
        weigh(key, before[c] > floor ? before[c] : floor, fresh, floor, decay[c], weight[c]);
        total[c] = 0;
      }
      for (int64_t s = 0; s < signals; ++s) {
        T* sum = carry.data() + s * SOFTMAX_BLOCK;
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
        dk[at + c] = narrow<S>((total[c] + mass[c]) * weight[c]);
        mass[c] *= decay[c];
      }
    }
    for (int64_t s = 0; s <= signals; ++s)
      std::copy_n(carry.data() + s * SOFTMAX_BLOCK, n, dsums0 + (row * (signals + 1) + s) * width + first);
  });
}

// averaged, last sums, running maximum, 1 / sum of the weights
inline std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_softmax_cpu(const Tensor& k, const Tensor& x, const Tensor& top0,
                                                                  const Tensor& sums0, const Maybe& reset) {
  const Tensor key = k.contiguous(), u = x.contiguous(), m = top0.contiguous(), start = sums0.contiguous();
  const Tensor fresh = reset ? reset->contiguous() : Tensor();
  Tensor y = at::empty_like(u), top = at::empty(key.sizes(), u.options()), inverse = at::empty_like(top);
  Tensor last = at::empty_like(start);
  COMPUTED(u, key.scalar_type(), T, S,
           softmax_forward<T>(in<S>(key), in<T>(u), in<T>(m), in<T>(start), in<bool>(fresh), out<T>(y), out<T>(top),
                              out<T>(inverse), out<T>(last), u.size(0), u.size(1), u.size(2), u.size(3)));
  return {y, last, top, inverse};
}

inline std::tuple<Tensor, Tensor, Tensor> rnn_softmax_backward_cpu(const Tensor& dy, const Maybe& dlast,
                                                                   const Tensor& k, const Tensor& x, const Tensor& top0,
                                                                   const Maybe& reset, const Tensor& y,
                                                                   const Tensor& top, const Tensor& inverse) {
  const Tensor g = dy.contiguous(), key = k.contiguous(), u = x.contiguous();
  const Tensor carry = dlast ? dlast->contiguous() : at::zeros({u.size(0), u.size(2) + 1, u.size(3)}, u.options());
  const Tensor m = top0.contiguous(), fresh = reset ? reset->contiguous() : Tensor();
  Tensor dk = at::empty_like(key), dx = at::empty_like(u), dsums = at::empty_like(carry);
  COMPUTED(u, key.scalar_type(), T, S,
           softmax_reverse<T>(in<T>(g), in<T>(carry), in<S>(key), in<T>(u), in<T>(m), in<bool>(fresh), in<T>(y),
                              in<T>(top), in<T>(inverse), out<S>(dk), out<T>(dx), out<T>(dsums), u.size(0), u.size(1),
                              u.size(2), u.size(3)));
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
    ctx->set_materialize_grads(false);
    return {y, last, top, inverse};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("rnn_softmax_backward", decltype(rnn_softmax_backward_cpu));
    const auto s = ctx->get_saved_variables();
    auto [dk, dx, dsums] =
        op.call(or_zeros(grads[0], s[4]), maybe(grads[1]), s[0], s[1], s[2], maybe(s[3]), s[4], s[5], s[6]);
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
