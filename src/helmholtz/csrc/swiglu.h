// silu(a) * b of the halves of a row. Floor: 2 numbers in and 1 out forward, 3 in and 2 out backward.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t SWIGLU_ROWS = 16;  // of a piece of work
constexpr int64_t PAGE = 4096, LINE = 64;  // bytes

// Rows that lie whole pages apart share one set of each cache: the product that reads them is slower.
inline Tensor empty_rows(const Tensor& like) {
  const int64_t width = like.size(-1), item = like.element_size();
  std::vector<int64_t> sizes = like.sizes().vec();
  if (width * item % PAGE == 0) sizes.back() += LINE / item;
  return at::empty(sizes, like.options()).narrow(-1, 0, width);
}

// Rows at equal distances, whatever lies between them.
inline Tensor with_even_rows(const Tensor& x) {
  bool even = x.size(-1) <= 1 || x.stride(-1) == 1;
  for (int64_t d = 0; d + 2 < x.dim(); ++d) even = even && x.stride(d) == x.stride(d + 1) * x.size(d + 1);
  return even ? x : x.contiguous();
}

inline int64_t apart(const Tensor& x) { return x.dim() > 1 ? x.stride(-2) : 0; }

template <typename S, typename T = at::opmath_type<S>>
void swiglu_all(const Tensor& gate_up, const Tensor& y) {
  const int64_t width = y.size(-1), rows = width > 0 ? y.numel() / width : 0, stride = apart(gate_up);
  const S* from = in<S>(gate_up);
  S* to = out<S>(y);
  each((rows + SWIGLU_ROWS - 1) / SWIGLU_ROWS, [&](int64_t part) {
    for (int64_t row = part * SWIGLU_ROWS, end = std::min(row + SWIGLU_ROWS, rows); row < end; ++row) {
      const S *gate = from + row * stride, *up = gate + width;
      S* here = to + row * width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) here[c] = narrow<S>(wide(gate[c]) * sigmoid_of(wide(gate[c])) * wide(up[c]));
    }
  });
}

template <typename S, typename T = at::opmath_type<S>>
void swiglu_all_backward(const Tensor& dy, const Tensor& gate_up, const Tensor& dx) {
  const int64_t width = dy.size(-1), rows = width > 0 ? dy.numel() / width : 0;
  const int64_t stride = apart(gate_up), to_stride = apart(dx);
  const S *grad = in<S>(dy), *from = in<S>(gate_up);
  S* to = out<S>(dx);
  each((rows + SWIGLU_ROWS - 1) / SWIGLU_ROWS, [&](int64_t part) {
    for (int64_t row = part * SWIGLU_ROWS, end = std::min(row + SWIGLU_ROWS, rows); row < end; ++row) {
      const S *gate = from + row * stride, *up = gate + width, *g = grad + row * width;
      S *dgate = to + row * to_stride, *dup = dgate + width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const T a = wide(gate[c]), s = sigmoid_of(a), d = wide(g[c]);
        dgate[c] = narrow<S>(d * wide(up[c]) * s * (T(1) + a * (T(1) - s)));
        dup[c] = narrow<S>(d * a * s);
      }
    }
  });
}

inline Tensor swiglu_cpu(const Tensor& gate_up) {
  const Tensor from = with_even_rows(gate_up);
  std::vector<int64_t> sizes = from.sizes().vec();
  sizes.back() /= 2;
  Tensor y = at::empty(sizes, from.options());
  STORED(from, S, swiglu_all<S>(from, y));
  return y;
}

inline Tensor swiglu_backward_cpu(const Tensor& dy, const Tensor& gate_up) {
  const Tensor g = dy.contiguous(), from = with_even_rows(gate_up);
  Tensor dx = empty_rows(from);
  STORED(from, S, swiglu_all_backward<S>(g, from, dx));
  return dx;
}

struct SwiGLU : torch::autograd::Function<SwiGLU> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("swiglu", decltype(swiglu_cpu));
    ctx->save_for_backward({gate_up});
    return op.call(gate_up);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("swiglu_backward", decltype(swiglu_backward_cpu));
    return {op.call(grads[0], ctx->get_saved_variables()[0])};
  }
};

inline Tensor swiglu_autograd(const Tensor& gate_up) { return SwiGLU::apply(gate_up); }

}  // namespace helmholtz
