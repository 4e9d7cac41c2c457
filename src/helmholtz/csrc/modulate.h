// x + x s, taken apart into slices of the last dimension, each a tensor of its own: their gradients come in as they are
// and need not be joined first. Floor: 2 numbers in and 1 out per channel forward, 3 in and 2 out backward.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t MODULATED_ROWS = 16;  // of a piece of work

template <typename S>
void modulate_rows(const Tensor& joint, const Tensor& scale, const std::vector<Tensor>& slices) {
  const int64_t width = joint.size(-1), rows = joint.numel() / width;
  const S *x = in<S>(joint), *s = in<S>(scale);
  each((rows + MODULATED_ROWS - 1) / MODULATED_ROWS, [&](int64_t part) {
    const int64_t first = part * MODULATED_ROWS, last = std::min(first + MODULATED_ROWS, rows);
    int64_t from = 0;
    for (const Tensor& slice : slices) {
      const int64_t n = slice.size(-1);
      S* to = slice.mutable_data_ptr<S>();
      for (int64_t row = first; row < last; ++row) {
        const S *a = x + row * width + from, *b = s + row * width + from;
        S* y = to + row * n;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) y[c] = narrow<S>(wide(a[c]) + wide(a[c]) * wide(b[c]));
      }
      from += n;
    }
  });
}

template <typename S>
void modulate_rows_backward(const std::vector<Tensor>& grads, const Tensor& joint, const Tensor& scale,
                            const Tensor& djoint, const Tensor& dscale) {
  const int64_t width = joint.size(-1), rows = joint.numel() / width, steps = joint.size(1);
  const S *x = in<S>(joint), *s = in<S>(scale);
  S *dx = out<S>(djoint), *ds = out<S>(dscale);
  each((rows + MODULATED_ROWS - 1) / MODULATED_ROWS, [&](int64_t part) {
    const int64_t first = part * MODULATED_ROWS, last = std::min(first + MODULATED_ROWS, rows);
    int64_t from = 0;
    for (const Tensor& grad : grads) {
      const int64_t n = grad.size(-1), b = grad.stride(0), t = grad.stride(1);
      const S* all = in<S>(grad);
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = row * width + from;
        const S* g = all + row / steps * b + row % steps * t;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
          dx[at + c] = narrow<S>(wide(g[c]) + wide(g[c]) * wide(s[at + c]));
          ds[at + c] = narrow<S>(wide(g[c]) * wide(x[at + c]));
        }
      }
      from += n;
    }
  });
}

inline std::vector<Tensor> modulate_cpu(const Tensor& joint, const Tensor& scale, at::IntArrayRef widths) {
  const Tensor x = joint.contiguous(), s = scale.contiguous();
  std::vector<Tensor> slices;
  for (const int64_t width : widths) slices.push_back(at::empty({x.size(0), x.size(1), width}, x.options()));
  if (x.numel() > 0) STORED(x, S, modulate_rows<S>(x, s, slices));
  return slices;
}

inline std::tuple<Tensor, Tensor> modulate_backward_cpu(at::TensorList grads, const Tensor& joint,
                                                        const Tensor& scale) {
  const Tensor x = joint.contiguous(), s = scale.contiguous();
  std::vector<Tensor> rows;
  for (const Tensor& grad : grads) rows.push_back(grad.stride(-1) == 1 ? grad : grad.contiguous());
  Tensor dx = at::empty_like(x), ds = at::empty_like(s);
  if (x.numel() > 0) STORED(x, S, modulate_rows_backward<S>(rows, x, s, dx, ds));
  return {dx, ds};
}

struct Modulate : torch::autograd::Function<Modulate> {
  static variable_list forward(AutogradContext* ctx, const Tensor& joint, const Tensor& scale, at::IntArrayRef widths) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("modulate", decltype(modulate_cpu));
    ctx->save_for_backward({joint, scale});
    return op.call(joint, scale, widths);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("modulate_backward", decltype(modulate_backward_cpu));
    const auto saved = ctx->get_saved_variables();
    auto [djoint, dscale] = op.call(grads, saved[0], saved[1]);  // a slice that nobody read has a gradient of zeros
    return {djoint, dscale, Tensor()};
  }
};

inline std::vector<Tensor> modulate_autograd(const Tensor& joint, const Tensor& scale, at::IntArrayRef widths) {
  return Modulate::apply(joint, scale, widths);
}

}  // namespace helmholtz
