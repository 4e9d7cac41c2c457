// Heads side by side, the first of them turned: queries, keys, and values as they are, each head's rows together or, as
// they came, each step's heads. Floor:
// 1 number in and 1 out, forward and backward.
#pragma once

#include "common.h"

namespace helmholtz {

constexpr int64_t ROPE_STEPS = 8;  // of a piece of work

// Strides of heads' rows, B T N K in any order but the last.
template <typename S>
struct Heads {
  S* data;
  int64_t b, t, n;
  S* at(int64_t i, int64_t j, int64_t k) const { return data + i * b + j * t + k * n; }
};

template <typename S>
INLINE void turn(const S* x, const at::opmath_type<S>* cos, const at::opmath_type<S>* sin, at::opmath_type<S> sign, S* y,
                 int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const auto a = wide(x[i]), b = wide(x[i + half]), s = sign * sin[i + half];  // the table's first half is negated
    y[i] = narrow<S>(a * cos[i] - b * s);
    y[i + half] = narrow<S>(b * cos[i] + a * s);
  }
}

// work(b, t, table row) for all tokens of `size` numbers
template <typename F>
void each_token(int64_t batch, int64_t steps, bool per_row, int64_t size, const F& work) {
  const int64_t pieces = (steps + ROPE_STEPS - 1) / ROPE_STEPS;
  each(batch * pieces, [&](int64_t part) {
    const int64_t b = part / pieces, first = part % pieces * ROPE_STEPS, last = std::min(first + ROPE_STEPS, steps);
    for (int64_t t = first; t < last; ++t) work(b, t, (per_row ? b * steps : 0) + t);
  }, std::min(ROPE_STEPS, steps) * size);
}

template <typename S>
Heads<const S> heads_in(const Tensor& x) {  // B N T K
  return {x.const_data_ptr<S>(), x.stride(0), x.stride(2), x.stride(1)};
}
template <typename S>
Heads<S> heads_out(const Tensor& x) {
  return {x.mutable_data_ptr<S>(), x.stride(0), x.stride(2), x.stride(1)};
}

// `apart` holds queries, keys and values B N T K; from the joint tensor B T N K to them, or back by the opposite angle.
template <typename S, bool back, typename T = at::opmath_type<S>>
void rope_all(const Tensor& joint, const Tensor& cosines, const Tensor& sines, const std::array<Tensor, 3>& apart) {
  const int64_t batch = joint.size(0), steps = joint.size(1), width = joint.size(3);
  const T *cos = in<T>(cosines), *sin = in<T>(sines);
  using Side = std::conditional_t<back, Heads<const S>, Heads<S>>;
  using Whole = std::conditional_t<back, Heads<S>, Heads<const S>>;
  Whole whole;
  Side sides[3];
  if constexpr (back) {
    whole = {joint.mutable_data_ptr<S>(), joint.stride(0), joint.stride(1), joint.stride(2)};
    for (int i = 0; i < 3; ++i) sides[i] = heads_in<S>(apart[i]);
  } else {
    whole = {joint.const_data_ptr<S>(), joint.stride(0), joint.stride(1), joint.stride(2)};
    for (int i = 0; i < 3; ++i) sides[i] = heads_out<S>(apart[i]);
  }
  each_token(batch, steps, cosines.dim() == 3, joint.size(2) * width, [&](int64_t b, int64_t t, int64_t row) {
    int64_t n = 0;
    for (int i = 0; i < 3; ++i)
      for (int64_t h = 0; h < apart[i].size(1); ++h, ++n) {
        auto* one = whole.at(b, t, n);
        auto* other = sides[i].at(b, t, h);
        if (i == 2) {
          if constexpr (back) std::copy_n(other, width, one);
          else std::copy_n(one, width, other);
        } else {
          if constexpr (back) turn<S>(other, cos + row * width, sin + row * width, T(-1), one, width / 2);
          else turn<S>(one, cos + row * width, sin + row * width, T(1), other, width / 2);
        }
      }
  });
}

inline Tensor with_last_whole(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

// T K, or B T K where rows differ
inline Tensor table_of(int64_t batch, int64_t steps, const Tensor& x) {
  return (x.dim() == 3 ? x.expand({batch, steps, -1}) : x.expand({steps, -1})).contiguous();
}

inline std::tuple<Tensor, Tensor, Tensor> rope_cpu(const Tensor& joint, const Tensor& cos, const Tensor& sin,
                                                   int64_t heads, int64_t groups, bool heads_first) {
  const Tensor from = with_last_whole(joint), c = table_of(from.size(0), from.size(1), cos);
  const Tensor s = table_of(from.size(0), from.size(1), sin);
  const auto rows = [&](int64_t n) {
    return heads_first ? at::empty({from.size(0), n, from.size(1), from.size(3)}, from.options())
                       : at::empty({from.size(0), from.size(1), n, from.size(3)}, from.options()).transpose(1, 2);
  };
  Tensor q = rows(heads), k = rows(groups), v = rows(groups);
  STORED(from, S, rope_all<S, false>(from, c, s, {q, k, v}));
  return {q, k, v};
}

inline Tensor rope_backward_cpu(const Tensor& dq, const Maybe& dk, const Maybe& dv, const Tensor& cos,
                                const Tensor& sin) {
  const Tensor q = with_last_whole(dq), none = q.narrow(1, 0, 0);
  const Tensor k = dk ? with_last_whole(*dk) : none, v = dv ? with_last_whole(*dv) : none;
  const Tensor c = table_of(q.size(0), q.size(2), cos), s = table_of(q.size(0), q.size(2), sin);
  Tensor joint = at::empty({q.size(0), q.size(2), q.size(1) + 2 * k.size(1), q.size(3)}, q.options());
  STORED(joint, S, rope_all<S, true>(joint, c, s, {q, k, v}));
  return joint;
}

struct Rope : torch::autograd::Function<Rope> {
  static variable_list forward(AutogradContext* ctx, const Tensor& joint, const Tensor& cos, const Tensor& sin,
                               int64_t heads, int64_t groups, bool heads_first) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("rope", decltype(rope_cpu));
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["heads"] = std::vector<int64_t>{heads, groups, groups};
    ctx->set_materialize_grads(false);
    auto [q, k, v] = op.call(joint, cos, sin, heads, groups, heads_first);
    return {q, k, v};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("rope_backward", decltype(rope_backward_cpu));
    const auto s = ctx->get_saved_variables();
    const auto heads = ctx->saved_data["heads"].toIntVector();
    const auto found = std::find_if(grads.begin(), grads.end(), [](const Tensor& x) { return x.defined(); });
    if (found == grads.end()) return variable_list(6);
    const Tensor& one = *found;
    const auto of = [&](int i) {
      return grads[i].defined() ? grads[i] : at::zeros({one.size(0), heads[i], one.size(2), one.size(3)}, one.options());
    };
    const bool alone = heads[1] == 0;
    return {op.call(of(0), alone ? Maybe() : of(1), alone ? Maybe() : of(2), s[0], s[1]), Tensor(), Tensor(), Tensor(),
            Tensor(), Tensor()};
  }
};

inline std::tuple<Tensor, Tensor, Tensor> rope_autograd(const Tensor& joint, const Tensor& cos, const Tensor& sin,
                                                        int64_t heads, int64_t groups, bool heads_first) {
  auto all = Rope::apply(joint, cos, sin, heads, groups, heads_first);
  return {all[0], all[1], all[2]};
}

}  // namespace helmholtz
