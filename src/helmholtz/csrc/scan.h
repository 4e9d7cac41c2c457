// h_t = a_t h_{t-1} + x_t, a block of channels after another; with LOGITS a_t = sigmoid(-r_t) of the numbers r_t that come.
// Floor: 3 numbers to and from memory per step and channel forward, 5 backward.
#pragma once

#include "rows.h"

namespace helmholtz {

constexpr int64_t SCAN_BLOCK = 16;

template <bool LOGITS, typename T>
INLINE T decay_of(T given) {
  return LOGITS ? sigmoid_of(-given) : given;
}

template <bool LOGITS, typename T, typename S>
void scan_forward(Rows<const S> a, Rows<const S> x, const T* start, T* h, T* last, int64_t batch, int64_t steps,
                  int64_t width) {
  const int64_t blocks = (width + SCAN_BLOCK - 1) / SCAN_BLOCK;
  each(batch * blocks, [&](int64_t part) {
    const int64_t row = part / blocks, first = part % blocks * SCAN_BLOCK;
    const int64_t n = std::min(SCAN_BLOCK, width - first);
    T carry[SCAN_BLOCK];
    std::copy_n(start + row * width + first, n, carry);
    for (int64_t t = 0; t < steps; ++t) {
      const S *rate = a.at(row, t, 0) + first, *added = x.at(row, t, 0) + first;
      T* to = h + (row * steps + t) * width + first;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) to[c] = carry[c] = decay_of<LOGITS>(wide(rate[c])) * carry[c] + wide(added[c]);
    }
    std::copy_n(carry, n, last + row * width + first);
  }, steps * SCAN_BLOCK);
}

template <bool LOGITS, typename T, typename S>
void scan_reverse(const T* dh, const T* dlast, Rows<const S> a, const T* h, const T* start, S* da, S* dx, T* dstart,
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
      const S* rate = a.at(row, t, 0) + first;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T d = dh[at + c] + carry[c], decay = decay_of<LOGITS>(wide(rate[c]));
        dx[at + c] = narrow<S>(d);
        da[at + c] = narrow<S>(LOGITS ? d * before[c] * decay * (decay - T(1)) : d * before[c]);
        carry[c] = d * decay;
      }
    }
    std::copy_n(carry, n, dstart + row * width + first);
  }, steps * SCAN_BLOCK);
}

// Rows of channels, B T C: one head each.
template <typename S>
Rows<const S> channel_rows(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.stride(0), x.stride(1), 0};
}

inline std::tuple<Tensor, Tensor> scan_cpu(const Tensor& decay, const Tensor& x, const Tensor& state, bool logits) {
  const Tensor a = with_whole_rows(decay), u = with_whole_rows(x), start = state.contiguous();
  Tensor h = at::empty(u.sizes(), start.options()), last = at::empty_like(start);
  COMPUTED(start, u.scalar_type(), T, S, const auto run = logits ? scan_forward<true, T, S> : scan_forward<false, T, S>;
           run(channel_rows<S>(a), channel_rows<S>(u), in<T>(start), out<T>(h), out<T>(last), u.size(0), u.size(1),
               u.size(2)));
  return {h, last};
}

inline std::tuple<Tensor, Tensor, Tensor> scan_backward_cpu(const Tensor& dh, const Maybe& dlast, const Tensor& decay,
                                                            const Tensor& h, const Tensor& state, bool logits) {
  const Tensor g = dh.contiguous(), a = with_whole_rows(decay), start = state.contiguous();
  const Tensor carry = or_zeros(dlast, start).contiguous();
  Tensor da = at::empty(a.sizes(), a.options()), dx = at::empty_like(da), dstart = at::empty_like(start);
  COMPUTED(start, a.scalar_type(), T, S, const auto run = logits ? scan_reverse<true, T, S> : scan_reverse<false, T, S>;
           run(in<T>(g), in<T>(carry), channel_rows<S>(a), in<T>(h), in<T>(start), out<S>(da), out<S>(dx),
               out<T>(dstart), h.size(0), h.size(1), h.size(2)));
  return {da, dx, dstart};
}

struct Scan : torch::autograd::Function<Scan> {
  static variable_list forward(AutogradContext* ctx, const Tensor& decay, const Tensor& x, const Tensor& state,
                               bool logits) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("scan", decltype(scan_cpu));
    auto [h, last] = op.call(decay, x, state, logits);
    ctx->save_for_backward({decay, h, state});
    ctx->saved_data["logits"] = logits;
    ctx->set_materialize_grads(false);
    return {h, last};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("scan_backward", decltype(scan_backward_cpu));
    const auto saved = ctx->get_saved_variables();
    auto [da, dx, dstart] = op.call(or_zeros(grads[0], saved[1]), maybe(grads[1]), saved[0], saved[1], saved[2],
                                    ctx->saved_data["logits"].toBool());
    return {da, dx, dstart, Tensor()};
  }
};

inline std::tuple<Tensor, Tensor> scan_autograd(const Tensor& decay, const Tensor& x, const Tensor& state, bool logits) {
  const auto y = Scan::apply(decay, x, state, logits);
  return {y[0], y[1]};
}

}  // namespace helmholtz
