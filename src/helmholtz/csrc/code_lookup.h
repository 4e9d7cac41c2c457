// A row of the table per code, with the gradient of its expectation over all codes in the logits of their bits. Floor of
// the backward pass: C D multiplications per token, and 2 C more for the bits.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t CODE_BITS = 9, CODE_TOKENS = 1024;  // of a tile: 2 MB in float32

// Probability of each of the 2^bits patterns of independent bits, the lowest bit first.
template <typename T>
void joint_of(const T* on, const T* off, int64_t bits, T* joint) {
  joint[0] = 1;
  for (int64_t h = 0; h < bits; ++h) {
    const int64_t n = int64_t(1) << h;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      joint[n + i] = joint[i] * on[h];
      joint[i] *= off[h];
    }
  }
}

// From x, a number per pattern, the derivative of its expectation in the logit of each bit: on off (E[x | on] - E[x |
// off]), the highest bit first, then x's own expectation over that bit. `joint` and `x` are used up.
template <typename T>
void fold(const T* on, const T* off, int64_t bits, T* joint, T* x, T* dlogit) {
  for (int64_t h = bits - 1; h >= 0; --h) {
    const int64_t n = int64_t(1) << h;
    T sum = 0;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) joint[i] += joint[n + i];  // of the lower bits alone
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      sum += joint[i] * (x[n + i] - x[i]);
      x[i] = off[h] * x[i] + on[h] * x[n + i];
    }
    dlogit[h] = on[h] * off[h] * sum;
  }
}

// Of one tile of tokens; `on` and `off` hold H numbers per token.
template <typename T>
void codes_of_tokens(const Tensor& rows, const Tensor& table, const T* on, const T* off, int64_t bits, T* dlogits) {
  const int64_t tokens = rows.size(0), low = std::min(bits, CODE_BITS), high = bits - low;
  const int64_t lows = int64_t(1) << low, highs = int64_t(1) << high;
  Tensor low_joint = at::empty({tokens, lows}, rows.options()), high_joint = at::empty({tokens, highs}, rows.options());
  Tensor over_high = at::zeros({tokens, lows}, rows.options()), over_low = at::empty({tokens, highs}, rows.options());
  Tensor tile = at::empty({tokens, lows}, rows.options());
  T *pl = out<T>(low_joint), *ph = out<T>(high_joint), *oh = out<T>(over_high), *ol = out<T>(over_low), *p = out<T>(tile);
  each(tokens, [&](int64_t n) {
    joint_of(on + n * bits, off + n * bits, low, pl + n * lows);
    joint_of(on + n * bits + low, off + n * bits + low, high, ph + n * highs);
  });
  for (int64_t part = 0; part < highs; ++part) {
    at::mm_out(tile, rows, table.narrow(0, part * lows, lows).t());
    each(tokens, [&](int64_t n) {
      const T *x = p + n * lows, *joint = pl + n * lows, weight = ph[n * highs + part];
      T* to = oh + n * lows;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < lows; ++i) {
        sum += joint[i] * x[i];
        to[i] += weight * x[i];
      }
      ol[n * highs + part] = sum;
    });
  }
  each(tokens, [&](int64_t n) {
    T* to = dlogits + n * bits;
    fold(on + n * bits, off + n * bits, low, pl + n * lows, oh + n * lows, to);
    fold(on + n * bits + low, off + n * bits + low, high, ph + n * highs, ol + n * highs, to + low);
  });
}

template <typename T>
void logits_of_codes(const Tensor& rows, const Tensor& table, const Tensor& on, const Tensor& off,
                     const Tensor& dlogits) {
  const int64_t tokens = rows.size(0), bits = on.size(1);
  for (int64_t first = 0; first < tokens; first += CODE_TOKENS)
    codes_of_tokens<T>(rows.narrow(0, first, std::min(CODE_TOKENS, tokens - first)), table, in<T>(on) + first * bits,
                       in<T>(off) + first * bits, bits, out<T>(dlogits) + first * bits);
}

inline Tensor code_lookup_cpu(const Tensor& table, const Tensor& code, const Tensor&) {
  return at::embedding(table, code);
}

inline std::tuple<Tensor, Tensor> code_lookup_backward_cpu(const Tensor& dy, const Tensor& table, const Tensor& code,
                                                           const Tensor& logits) {
  const auto type = at::promote_types(at::promote_types(table.scalar_type(), logits.scalar_type()), at::kFloat);
  const Tensor rows = dy.reshape({-1, table.size(1)}).to(type);
  const Tensor wide_logits = logits.reshape({-1, logits.size(-1)}).to(type).contiguous();  // read below as rows
  const Tensor on = wide_logits.sigmoid(), off = wide_logits.neg().sigmoid();  // 1 - on would lose a small off
  Tensor dtable = at::zeros(table.sizes(), rows.options()), dlogits = at::empty(on.sizes(), rows.options());
  dtable.index_add_(0, code.reshape(-1), rows);
  FLOATING(rows, T, logits_of_codes<T>(rows, table.to(type), on, off, dlogits));
  return {dtable.to(table.scalar_type()), dlogits.view(logits.sizes()).to(logits.scalar_type())};
}

struct CodeLookup : torch::autograd::Function<CodeLookup> {
  static Tensor forward(AutogradContext* ctx, const Tensor& table, const Tensor& code, const Tensor& logits) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("code_lookup", decltype(code_lookup_cpu));
    ctx->save_for_backward({table, code, logits});
    return op.call(table, code, logits);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("code_lookup_backward", decltype(code_lookup_backward_cpu));
    const auto s = ctx->get_saved_variables();
    auto [dtable, dlogits] = op.call(grads[0], s[0], s[1], s[2]);
    return {dtable, Tensor(), dlogits};
  }
};

inline Tensor code_lookup_autograd(const Tensor& table, const Tensor& code, const Tensor& logits) {
  return CodeLookup::apply(table, code, logits);
}

}  // namespace helmholtz
