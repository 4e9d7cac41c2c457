// One token of a state-space model whose heads decay as a whole, with its gate. Floor: the state read and written once, 2
// numbers and 6 operations for each of its H P N.
#pragma once

#include "rows.h"

namespace helmholtz {

template <typename S>
struct SsdStep {
  using T = at::opmath_type<S>;
  int64_t heads, width, states;
  Rows<const S> x, gate;  // B 1 H P
  Rows<const S> b, c;     // B 1 1 N
  const T *delta, *rates, *skip, *state;
  S* y;
  T* last;

  // what of the state's row is read: as it will be, or, where strict, as it fades
  template <bool strict>
  void head(int64_t batch, int64_t h) const {
    const int64_t part = batch * heads + h;
    const S *write = b.at(batch, 0, 0), *read = c.at(batch, 0, 0), *in = x.at(batch, 0, h);
    const S* g = gate.data == nullptr ? nullptr : gate.at(batch, 0, h);
    const T step = delta[part], decay = exp_of(step * rates[h]), own = skip == nullptr ? T(0) : skip[h];
    const T* from = state + part * width * states;
    T* to = last + part * width * states;
    std::vector<T> sums(width);
    for (int64_t p = 0; p < width; ++p, from += states, to += states) {
      const T u = step * wide(in[p]);
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t n = 0; n < states; ++n) {
        const T past = decay * from[n], now = past + u * wide(write[n]);
        to[n] = now;
        sum += (strict ? past : now) * wide(read[n]);
      }
      sums[p] = sum + own * wide(in[p]);
    }
    if (g != nullptr) {
#pragma omp simd
      for (int64_t p = 0; p < width; ++p) sums[p] *= wide(g[p]) * sigmoid_of(wide(g[p]));
    }
    std::transform(sums.begin(), sums.end(), y + part * width, narrow<S, T>);
  }
};

inline std::tuple<Tensor, Tensor> ssd_step_cpu(const Tensor& x, const Tensor& delta, const Tensor& A, const Tensor& B,
                                               const Tensor& C, const Maybe& D, const Maybe& gate, const Tensor& state,
                                               bool strict) {
  const int64_t batch = x.size(0), heads = x.size(2), width = x.size(3), states = B.size(-1);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == 1 && state.sizes() == at::IntArrayRef({batch, heads, width, states}) &&
                        delta.numel() == batch * heads && A.numel() == heads && C.sizes() == B.sizes() &&
                        (!gate || gate->sizes() == x.sizes()),
                    "x, delta, A, B, C, gate, state: these shapes do not belong to one token");
  const auto computed = at::toOpMathType(x.scalar_type());
  const auto whole = [&](const Tensor& z) { return z.to(computed).contiguous(); };
  const auto rows = [&](const Tensor& z) { return with_whole_rows(z.to(x.scalar_type())); };
  const Tensor steps = whole(delta), rates = whole(A), skip = D ? whole(*D) : Tensor(), from = whole(state);
  const Tensor in = rows(x), b = rows(B).unsqueeze(2), c = rows(C).unsqueeze(2), g = gate ? rows(*gate) : Tensor();
  Tensor y = at::empty(x.sizes(), x.options()), last = at::empty(state.sizes(), from.options());
  STORED(x, S, {
    using T = at::opmath_type<S>;
    const SsdStep<S> of{heads, width, states, rows_of<S>(in), rows_of<S>(g), rows_of<S>(b), rows_of<S>(c),
                        helmholtz::in<T>(steps), helmholtz::in<T>(rates), helmholtz::in<T>(skip),
                        helmholtz::in<T>(from), out<S>(y), out<T>(last)};
    each(batch * heads, [&](int64_t part) {
      strict ? of.template head<true>(part / heads, part % heads) : of.template head<false>(part / heads, part % heads);
    }, width * states);
  });
  return {y, last};
}

}  // namespace helmholtz
