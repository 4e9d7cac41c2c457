// The two-level gated read: logarithm, temperature gate and outer gate, a row of V channels at a time. Floor: 4 numbers
// in and 1 out per channel forward, 5 in and 4 out backward.
#pragma once

#include "common.h"

namespace helmholtz {

// Rows of one tensor B T H ...: the last dimensions lie side by side, the first three anywhere.
template <typename T>
struct Rows {
  T* data;
  int64_t b, t, h;
  T* at(int64_t i, int64_t j, int64_t k) const { return data == nullptr ? nullptr : data + i * b + j * t + k * h; }
};

template <typename T>
Rows<const T> rows_of(const Tensor& x) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
Rows<T> new_rows(const Tensor& x) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

inline Tensor with_whole_rows(const Tensor& x) {
  if (!x.defined()) return x;
  int64_t apart = 1;
  bool whole = true;
  for (int64_t d = x.dim() - 1; d > 2; apart *= x.size(d--)) whole = whole && x.stride(d) == apart;
  return whole ? x : x.contiguous();
}

// 0 where a row saw nothing, all of whose averages are 0; else 1.
template <typename T>
INLINE T saw_something(const T* partition, int64_t width) {
  T top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < width; ++v) top = std::max(top, partition[v]);
  return top > T(0) ? T(1) : T(0);
}

// u / rms(u), u = softplus(raw) + eps; returns 1 / rms(u).
template <typename T>
INLINE T outer_gate(const T* raw, T eps, T* gate, int64_t width) {
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t v = 0; v < width; ++v) {
    gate[v] = softplus_of(raw[v]) + eps;
    squares += gate[v] * gate[v];
  }
  const T scale = T(1) / std::sqrt(squares / T(width));
#pragma omp simd
  for (int64_t v = 0; v < width; ++v) gate[v] *= scale;
  return scale;
}

template <typename T>
void read_row(const T* mixed, const T* beta, const T* inner, const T* outer, T eps, T* y, T* gate, int64_t width) {
  const T *mean = mixed, *partition = mixed + width;
  const T seen = saw_something(partition, width);
  if (inner != nullptr) {
#pragma omp simd
    for (int64_t v = 0; v < width; ++v) {
      const T free = log_of(partition[v] + (T(1) - seen)) / beta[v];
      y[v] = mean[v] + sigmoid_of(inner[v]) * (free - mean[v]);
    }
  } else {
#pragma omp simd
    for (int64_t v = 0; v < width; ++v) y[v] = log_of(partition[v] + (T(1) - seen)) / beta[v];
  }
  if (outer == nullptr) return;
  outer_gate(outer, eps, gate, width);
#pragma omp simd
  for (int64_t v = 0; v < width; ++v) y[v] *= gate[v];
}

template <typename T>
void read_row_backward(const T* dy, const T* mixed, const T* beta, const T* inner, const T* outer, T eps, T* dmixed,
                       T* dbeta, T* dinner, T* douter, T* scratch, int64_t width) {
  const T *mean = mixed, *partition = mixed + width;
  T *gate = scratch, *g = scratch + width, *dmean = dmixed, *dpartition = dmixed + width;
  const T seen = saw_something(partition, width);
  std::copy_n(dy, width, g);
  if (outer != nullptr) {
    const T scale = outer_gate(outer, eps, gate, width);
    T along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t v = 0; v < width; ++v) {
      const T free = log_of(partition[v] + (T(1) - seen)) / beta[v];
      const T read = inner == nullptr ? free : mean[v] + sigmoid_of(inner[v]) * (free - mean[v]);
      douter[v] = dy[v] * read;
      along += douter[v] * gate[v];
      g[v] = dy[v] * gate[v];
    }
    along /= T(width);
#pragma omp simd
    for (int64_t v = 0; v < width; ++v) douter[v] = (douter[v] - gate[v] * along) * scale * sigmoid_of(outer[v]);
  }
#pragma omp simd
  for (int64_t v = 0; v < width; ++v) {
    const T z = partition[v] + (T(1) - seen), free = log_of(z) / beta[v];
    const T lam = inner == nullptr ? T(1) : sigmoid_of(inner[v]);
    const T dfree = g[v] * lam, scaled = dfree / beta[v];
    dmean[v] = inner == nullptr ? T(0) : g[v] - dfree;
    dpartition[v] = seen * scaled / z;
    dbeta[v] -= scaled * free;
    if (dinner != nullptr) dinner[v] = dfree * (T(1) - lam) * (free - mean[v]);
  }
}

constexpr int64_t READ_ROWS = 16;  // time steps of a piece of work

template <typename T>
void read_all(const Tensor& mixed, const Tensor& beta, const Tensor& inner, const Tensor& outer, double eps,
              const Tensor& y) {
  const int64_t steps = mixed.size(1), heads = mixed.size(2), width = mixed.size(4);
  const int64_t pieces = (steps + READ_ROWS - 1) / READ_ROWS;
  const auto m = rows_of<T>(mixed), in_gate = rows_of<T>(inner), out_gate = rows_of<T>(outer);
  const auto to = new_rows<T>(y);
  const T* rate = in<T>(beta);
  each(mixed.size(0) * pieces, [&](int64_t part) {
    std::vector<T> gate(width);
    const int64_t b = part / pieces, first = part % pieces * READ_ROWS, last = std::min(first + READ_ROWS, steps);
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < heads; ++h)
        read_row<T>(m.at(b, t, h), rate + h * width, in_gate.at(b, t, h), out_gate.at(b, t, h), T(eps), to.at(b, t, h),
                    gate.data(), width);
  });
}

template <typename T>
void read_all_backward(const Tensor& dy, const Tensor& mixed, const Tensor& beta, const Tensor& inner,
                       const Tensor& outer, double eps, const Tensor& dmixed, const Tensor& dbeta, const Tensor& dinner,
                       const Tensor& douter) {
  const int64_t steps = mixed.size(1), heads = mixed.size(2), width = mixed.size(4);
  const int64_t pieces = (steps + READ_ROWS - 1) / READ_ROWS, parts = mixed.size(0) * pieces;
  const auto g = rows_of<T>(dy), m = rows_of<T>(mixed), in_gate = rows_of<T>(inner), out_gate = rows_of<T>(outer);
  const auto to = new_rows<T>(dmixed), to_in = new_rows<T>(dinner), to_out = new_rows<T>(douter);
  const T* rate = in<T>(beta);
  Tensor sums = at::zeros({parts, heads, width}, mixed.options());
  T* all = out<T>(sums);
  each(parts, [&](int64_t part) {
    std::vector<T> scratch(2 * width);
    const int64_t b = part / pieces, first = part % pieces * READ_ROWS, last = std::min(first + READ_ROWS, steps);
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < heads; ++h)
        read_row_backward<T>(g.at(b, t, h), m.at(b, t, h), rate + h * width, in_gate.at(b, t, h), out_gate.at(b, t, h),
                             T(eps), to.at(b, t, h), all + (part * heads + h) * width, to_in.at(b, t, h),
                             to_out.at(b, t, h), scratch.data(), width);
  });
  dbeta.copy_(sums.sum(0));
}

inline Tensor gated_read_cpu(const Tensor& mixed, const Tensor& beta, const Maybe& inner, const Maybe& outer,
                             double eps) {
  const Tensor m = with_whole_rows(mixed), i = with_whole_rows(defined(inner)), o = with_whole_rows(defined(outer));
  const Tensor rate = beta.contiguous();
  Tensor y = at::empty({m.size(0), m.size(1), m.size(2), m.size(4)}, m.options());
  FLOATING(m, T, read_all<T>(m, rate, i, o, eps, y));
  return y;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> gated_read_backward_cpu(const Tensor& dy, const Tensor& mixed,
                                                                          const Tensor& beta, const Maybe& inner,
                                                                          const Maybe& outer, double eps) {
  const Tensor g = dy.contiguous(), rate = beta.contiguous();
  const Tensor m = with_whole_rows(mixed), i = with_whole_rows(defined(inner)), o = with_whole_rows(defined(outer));
  const auto like = [](const Tensor& x, const Tensor& other) {
    return x.defined() ? at::empty(x.sizes(), x.options()) : at::empty({0}, other.options());
  };
  // heads before time, as the mixed signals came from attention or a recurrence: no copy on the way back
  Tensor dmixed = at::empty({m.size(0), m.size(2), m.size(1), 2, m.size(4)}, m.options()).transpose(1, 2);
  Tensor dbeta = at::empty_like(rate), dinner = like(i, m), douter = like(o, m);
  FLOATING(m, T, read_all_backward<T>(g, m, rate, i, o, eps, dmixed, dbeta, i.defined() ? dinner : i,
                                      o.defined() ? douter : o));
  return {dmixed, dbeta, dinner, douter};
}

struct GatedRead : torch::autograd::Function<GatedRead> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mixed, const Tensor& beta, const Maybe& inner,
                        const Maybe& outer, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("gated_read", decltype(gated_read_cpu));
    ctx->save_for_backward({mixed, beta, defined(inner), defined(outer)});
    ctx->saved_data["eps"] = eps;
    return op.call(mixed, beta, inner, outer, eps);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("gated_read_backward", decltype(gated_read_backward_cpu));
    const auto s = ctx->get_saved_variables();
    const Maybe inner = s[2].defined() ? Maybe(s[2]) : std::nullopt, outer = s[3].defined() ? Maybe(s[3]) : std::nullopt;
    auto [dmixed, dbeta, dinner, douter] = op.call(grads[0], s[0], s[1], inner, outer, ctx->saved_data["eps"].toDouble());
    return {dmixed, dbeta, inner ? dinner : Tensor(), outer ? douter : Tensor(), Tensor()};
  }
};

inline Tensor gated_read_autograd(const Tensor& mixed, const Tensor& beta, const Maybe& inner, const Maybe& outer,
                                  double eps) {
  return GatedRead::apply(mixed, beta, inner, outer, eps);
}

}  // namespace helmholtz
