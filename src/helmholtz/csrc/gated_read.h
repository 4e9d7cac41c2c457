// The two-level gated read: logarithm, temperature gate, outer gate and a prior's own gate, a token with all its heads
// at a time. Floor: 5 numbers in and 1 out per channel forward, 6 in and 5 out backward; gates and the result are of
// the gates' dtype.
#pragma once

#include "rows.h"

namespace helmholtz {

// 1 in every channel of a head that saw nothing, all of whose averages are 0; else 0.
template <typename T>
void find_blind(const T* partition, HeadSizes heads, T* blind) {
  for (int64_t h = 0; h < heads.count; ++h) {
    T top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t v = h * heads.width; v < (h + 1) * heads.width; ++v) top = std::max(top, partition[v]);
    std::fill_n(blind + h * heads.width, heads.width, top > T(0) ? T(0) : T(1));
  }
}

// u / sqrt(mean over the head of u^2 + floor), u = softplus(raw) + eps; `scale` is the factor of each head.
template <typename T>
void unit_gate(const T* raw, T eps, T floor, HeadSizes heads, T* gate, T* scale) {
#pragma omp simd
  for (int64_t c = 0; c < heads.padded(); ++c) gate[c] = softplus_of(raw[c]) + eps;
  for (int64_t h = 0; h < heads.count; ++h, gate += heads.width) {
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t v = 0; v < heads.width; ++v) squares += gate[v] * gate[v];
    scale[h] = T(1) / std::sqrt(squares / T(heads.width) + floor);
#pragma omp simd
    for (int64_t v = 0; v < heads.width; ++v) gate[v] *= scale[h];
  }
}

// The gradient of `raw` in place of that of the gate.
template <typename T>
void unit_gate_backward(const T* raw, HeadSizes heads, const T* gate, const T* scale, T* grad) {
  for (int64_t h = 0; h < heads.count; ++h) {
    const int64_t first = h * heads.width, last = first + heads.width;
    T along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t c = first; c < last; ++c) along += grad[c] * gate[c];
    along /= T(heads.width);
#pragma omp simd
    for (int64_t c = first; c < last; ++c) grad[c] = (grad[c] - gate[c] * along) * scale[h];
  }
#pragma omp simd
  for (int64_t c = 0; c < heads.padded(); ++c) grad[c] *= sigmoid_of(raw[c]);
}

// A gate B T H V, or B T (H V) with whole rows.
template <typename R>
R gate_rows(R rows, const Tensor& gate, int64_t width) {
  if (gate.defined() && gate.dim() == 3) rows.h = width;
  return rows;
}

constexpr int64_t READ_STEPS = 16;  // tokens of a piece of work

// What is read, of the averages and of the gates; `T` is computed in, `S` the dtype of gates and result.
template <typename T, typename S>
struct Read {
  Rows<const T> mean, partition;  // no partition: the mean alone is read
  Rows<const S> inner, gates[2];  // the second is normalised with a floor, as torch's rms_norm
  const T* beta;
  T eps;
  HeadSizes heads;
  int64_t batch, steps;

  Read(const Tensor& mixed, const Tensor& rate, const Tensor& in_gate, const Tensor& outer, const Tensor& own,
       double little)
      : mean(rows_of<T>(mixed.select(3, 0))),
        partition(rate.defined() ? rows_of<T>(mixed.select(3, 1)) : rows_of<T>(Tensor())),
        inner(gate_rows(rows_of<S>(in_gate), in_gate, mixed.size(4))),
        gates{gate_rows(rows_of<S>(outer), outer, mixed.size(4)), gate_rows(rows_of<S>(own), own, mixed.size(4))},
        beta(in<T>(rate)),
        eps(T(little)),
        heads{mixed.size(2), mixed.size(4)},
        batch(mixed.size(0)),
        steps(mixed.size(1)) {}

  int64_t pieces() const { return (steps + READ_STEPS - 1) / READ_STEPS; }
};

// A token's numbers while it is worked on; what lies beyond the channels is harmless.
template <typename T>
struct Token {
  std::vector<T> memory, scale;
  T *beta, *mean, *partition, *blind, *raw_inner, *lam, *free, *read, *raw[2], *gate[2], *grad[2], *dy, *d[4];

  Token(HeadSizes heads, const T* rate) : memory(19 * heads.padded()), scale(2 * heads.count) {
    T* next = memory.data();
    for (T** x : {&beta, &mean, &partition, &blind, &raw_inner, &lam, &free, &read, &raw[0], &raw[1], &gate[0],
                  &gate[1], &grad[0], &grad[1], &dy, &d[0], &d[1], &d[2], &d[3]}) {
      *x = next;
      next += heads.padded();
    }
    for (T* ones : {beta, blind, lam, gate[0], gate[1]}) std::fill_n(ones, heads.padded(), T(1));
    if (rate != nullptr) std::copy_n(rate, heads.channels(), beta);
  }

  // Loops of their own on pointers of their own: within `take` a compiler leaves them scalar.
  __attribute__((noinline)) void free_energy(int64_t n) {
    const T *rate = beta, *average = partition, *none = blind;
    T* to = free;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) to[c] = log_of(average[c] + none[c]) / rate[c];
  }

  __attribute__((noinline)) void blend(int64_t n) {
    const T *logit = raw_inner, *one = mean, *other = free;
    T *weight = lam, *to = read;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      weight[c] = sigmoid_of(logit[c]);
      to[c] = one[c] + weight[c] * (other[c] - one[c]);
    }
  }

  template <typename S>
  void take(const Read<T, S>& of, int64_t b, int64_t t) {
    const HeadSizes heads = of.heads;
    wide_heads(of.mean, b, t, heads, mean);
    if (of.beta == nullptr) {
      std::copy_n(mean, heads.padded(), read);
    } else {
      wide_heads(of.partition, b, t, heads, partition);
      find_blind(partition, heads, blind);
      free_energy(heads.padded());
      if (of.inner.data != nullptr) {
        wide_heads(of.inner, b, t, heads, raw_inner);
        blend(heads.padded());
      } else {
        std::copy_n(free, heads.padded(), read);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (of.gates[i].data == nullptr) continue;
      wide_heads(of.gates[i], b, t, heads, raw[i]);
      const T floor = i == 0 ? T(0) : std::numeric_limits<T>::epsilon();
      unit_gate(raw[i], of.eps, floor, heads, gate[i], scale.data() + i * heads.count);
    }
  }
};

template <typename T, typename S>
void read_all(const Read<T, S>& of, const Tensor& y) {
  const auto to = new_rows<S>(y);
  each(of.batch * of.pieces(), [&](int64_t part) {
    Token<T> token(of.heads, of.beta);
    const int64_t b = part / of.pieces(), first = part % of.pieces() * READ_STEPS;
    for (int64_t t = first; t < std::min(first + READ_STEPS, of.steps); ++t) {
      token.take(of, b, t);
#pragma omp simd
      for (int64_t c = 0; c < of.heads.padded(); ++c) token.read[c] *= token.gate[0][c] * token.gate[1][c];
      narrow_heads(token.read, to, b, t, of.heads);
    }
  });
}

template <typename T, typename S>
void read_all_backward(const Read<T, S>& of, const Tensor& dy, const Tensor& dmixed, const Tensor& dbeta,
                       const Tensor& dinner, const Tensor& douter, const Tensor& down) {
  const auto from = rows_of<S>(dy);
  const auto to_mean = new_rows<T>(dmixed.select(3, 0)),
             to_partition = new_rows<T>(of.beta == nullptr ? Tensor() : dmixed.select(3, 1));
  const auto to_gate = [&](const Tensor& x) { return gate_rows(new_rows<S>(x), x, of.heads.width); };
  const auto to_inner = to_gate(dinner);
  const Rows<S> to_gates[2] = {to_gate(douter), to_gate(down)};
  const int64_t parts = of.batch * of.pieces(), n = of.heads.padded();
  Tensor sums = at::zeros({parts, of.heads.channels()}, dmixed.options());
  T* all = out<T>(sums);
  each(parts, [&](int64_t part) {
    Token<T> token(of.heads, of.beta);
    T *dmean = token.d[0], *dpartition = token.d[1], *dlogit = token.d[2], *drate = token.d[3], *g = token.dy;
    const int64_t b = part / of.pieces(), first = part % of.pieces() * READ_STEPS;
    for (int64_t t = first; t < std::min(first + READ_STEPS, of.steps); ++t) {
      token.take(of, b, t);
      wide_heads(from, b, t, of.heads, g);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T along = g[c] * token.read[c];
        token.grad[0][c] = along * token.gate[1][c];
        token.grad[1][c] = along * token.gate[0][c];
        g[c] *= token.gate[0][c] * token.gate[1][c];
      }
      for (int i = 0; i < 2; ++i) {
        if (to_gates[i].data == nullptr) continue;
        unit_gate_backward(token.raw[i], of.heads, token.gate[i], token.scale.data() + i * of.heads.count,
                           token.grad[i]);
        narrow_heads(token.grad[i], to_gates[i], b, t, of.heads);
      }
      if (of.beta == nullptr) {
        narrow_heads(g, to_mean, b, t, of.heads);
        continue;
      }
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const T lam = token.lam[c], dfree = g[c] * lam, scaled = dfree / token.beta[c];
        dmean[c] = g[c] - dfree;
        dpartition[c] = (T(1) - token.blind[c]) * scaled / (token.partition[c] + token.blind[c]);
        drate[c] -= scaled * token.free[c];
        dlogit[c] = dfree * (T(1) - lam) * (token.free[c] - token.mean[c]);
      }
      narrow_heads(dmean, to_mean, b, t, of.heads);
      narrow_heads(dpartition, to_partition, b, t, of.heads);
      if (to_inner.data != nullptr) narrow_heads(dlogit, to_inner, b, t, of.heads);
    }
    std::copy_n(drate, of.heads.channels(), all + part * of.heads.channels());
  });
  if (dbeta.defined()) dbeta.copy_(sums.sum(0).view(dbeta.sizes()));
}

// The dtype of gates and result: bf16, or that of the averages.
inline at::ScalarType stored_as(const Tensor& mixed, const Tensor& inner, const Tensor& outer, const Tensor& own) {
  for (const Tensor& gate : {inner, outer, own})
    if (gate.defined()) return gate.scalar_type();
  return mixed.scalar_type();
}

inline Tensor gated_read_cpu(const Tensor& mixed, const Maybe& beta, const Maybe& inner, const Maybe& outer,
                             const Maybe& own, double eps) {
  const Tensor m = with_whole_rows(mixed), i = with_whole_rows(defined(inner)), o = with_whole_rows(defined(outer)),
               w = with_whole_rows(defined(own)), rate = beta ? beta->contiguous() : Tensor();
  const auto stored = stored_as(m, i, o, w);
  Tensor y = at::empty({m.size(0), m.size(1), m.size(2), m.size(4)}, m.options().dtype(stored));
  COMPUTED(m, stored, T, S, read_all(Read<T, S>(m, rate, i, o, w, eps), y));
  return y;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_read_backward_cpu(
    const Tensor& dy, const Tensor& mixed, const Maybe& beta, const Maybe& inner, const Maybe& outer, const Maybe& own,
    double eps) {
  const Tensor m = with_whole_rows(mixed), i = with_whole_rows(defined(inner)), o = with_whole_rows(defined(outer)),
               w = with_whole_rows(defined(own)), rate = beta ? beta->contiguous() : Tensor(), g = dy.contiguous();
  const auto like = [](const Tensor& x) { return x.defined() ? at::empty(x.sizes(), x.options()) : Tensor(); };
  Tensor dmixed = at::empty_like(m), dbeta = like(rate), di = like(i), dout = like(o), down = like(w);
  const auto stored = stored_as(m, i, o, w);
  COMPUTED(m, stored, T, S, read_all_backward(Read<T, S>(m, rate, i, o, w, eps), g, dmixed, dbeta, di, dout, down));
  const auto none = [&](const Tensor& x) { return x.defined() ? x : at::empty({0}, m.options()); };
  return {dmixed, none(dbeta), none(di), none(dout), none(down)};
}

struct GatedRead : torch::autograd::Function<GatedRead> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mixed, const Maybe& beta, const Maybe& inner,
                        const Maybe& outer, const Maybe& own, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("gated_read", decltype(gated_read_cpu));
    ctx->save_for_backward({mixed, defined(beta), defined(inner), defined(outer), defined(own)});
    ctx->saved_data["eps"] = eps;
    return op.call(mixed, beta, inner, outer, own, eps);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("gated_read_backward", decltype(gated_read_backward_cpu));
    const auto s = ctx->get_saved_variables();
    auto [dmixed, dbeta, dinner, douter, down] =
        op.call(grads[0], s[0], maybe(s[1]), maybe(s[2]), maybe(s[3]), maybe(s[4]), ctx->saved_data["eps"].toDouble());
    const auto of = [](const Tensor& x, const Tensor& grad) { return x.defined() ? grad : Tensor(); };
    return {dmixed, of(s[1], dbeta), of(s[2], dinner), of(s[3], douter), of(s[4], down), Tensor()};
  }
};

inline Tensor gated_read_autograd(const Tensor& mixed, const Maybe& beta, const Maybe& inner, const Maybe& outer,
                                  const Maybe& own, double eps) {
  return GatedRead::apply(mixed, beta, inner, outer, own, eps);
}

}  // namespace helmholtz
