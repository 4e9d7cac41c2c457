// The next tokens of a stream in one call: queries and keys turned, keys and values written behind those that a cache
// holds, and the read of all of them. Floor: the cache read once, 2 numbers per token, group and channel; at the length of
// a prompt that is less than the calls from Python, which are one here and were twelve. Of the softmax prior also an
// exponential per cached value.
#pragma once

#include "rope.h"
#include "softmax_read.h"

namespace helmholtz {

// A kernel writes past torch's own record of changes, by which autograd finds that what it kept is no longer there.
inline void note_change(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

// cos and sin of some tokens as rows of numbers, or nothing to turn by.
template <typename T>
struct RotaryTable {
  Tensor cos, sin;
  bool per_row;
  RotaryTable(const Maybe& c, const Maybe& s, int64_t batch, int64_t steps)
      : cos(rows(c, batch, steps)), sin(rows(s, batch, steps)), per_row(c && c->dim() == 3) {}
  static Tensor rows(const Maybe& x, int64_t batch, int64_t steps) {
    if (!x) return Tensor();
    const Tensor wide = x->to(c10::CppTypeToScalarType<T>::value);
    const bool fits = x->dim() == 3 ? x->size(0) == batch && x->size(1) == steps : x->size(0) == steps;
    return fits ? wide.contiguous() : table_of(batch, steps, wide);
  }
};

// `count` heads of every token, turned by a table or as they are.
template <typename S>
void place_heads(Heads<const S> from, Heads<S> to, int64_t batch, int64_t steps, int64_t count, int64_t width,
                 const RotaryTable<at::opmath_type<S>>* by) {
  using T = at::opmath_type<S>;
  const T *cos = by ? in<T>(by->cos) : nullptr, *sin = by ? in<T>(by->sin) : nullptr;
  each_token(batch, steps, by && by->per_row, count * width, [&](int64_t b, int64_t t, int64_t row) {
    for (int64_t h = 0; h < count; ++h) {
      const S* x = from.at(b, t, h);
      if (cos == nullptr) std::copy_n(x, width, to.at(b, t, h));
      else turn<S>(x, cos + row * width, sin + row * width, T(1), to.at(b, t, h), width / 2);
    }
  });
}

// Tokens B T (N K) as heads side by side, the first at `first`.
template <typename S>
Heads<const S> heads_within(const Tensor& x, int64_t first, int64_t width) {
  return {x.const_data_ptr<S>() + first * width, x.stride(0), x.stride(1), width};
}

template <typename S>
Rows<const S> as_rows(const Heads<S>& x) {
  return {x.data, x.b, x.n, x.t};
}

// What a call brings, and where it goes.
template <typename S>
struct NextTokens {
  using T = at::opmath_type<S>;
  Heads<const S> q, k, v;
  const RotaryTable<T>* table;
  const Tensor &keys, &values;
  int64_t before;
  typename SoftmaxRead<S>::Sizes sizes;

  void read(const T* beta, const bool* real, T cap, Rows<T> mixed) const {
    const auto& n = sizes;
    Room<S> turned(n.batch * n.heads * n.times * n.width);
    Room<T> lse(n.batch * n.heads * n.times);
    const Heads<S> queries{turned.data, n.heads * n.times * n.width, n.width, n.times * n.width};
    Heads<S> all_k = heads_out<S>(keys), all_v = heads_out<S>(values), new_k = all_k, new_v = all_v;
    new_k.data += before * all_k.t, new_v.data += before * all_v.t;
    place_heads<S>(q, queries, n.batch, n.times, n.heads, n.width, table);
    place_heads<S>(k, new_k, n.batch, n.times, n.groups, n.width, table);
    place_heads<S>(v, new_v, n.batch, n.times, n.groups, n.values, nullptr);
    softmax_read_all<S>(SoftmaxRead<S>(n, as_rows(queries), as_rows(all_k), as_rows(all_v), beta, real, true, cap), mixed,
                        lse.data);
    note_change(keys);
    note_change(values);
  }
};

inline void check_cache(const Tensor& keys, const Tensor& values, const Maybe& key_mask, int64_t batch, int64_t after) {
  TORCH_CHECK_VALUE(keys.dim() == 4 && values.dim() == 4 && keys.sizes().slice(0, 3) == values.sizes().slice(0, 3) &&
                        keys.size(0) == batch && after <= keys.size(2) && keys.stride(3) == 1 && values.stride(3) == 1,
                    "keys, values: no room for ", after, " tokens of ", batch, " rows in ", keys.sizes(), " and ",
                    values.sizes());
  TORCH_CHECK_VALUE(!key_mask || key_mask->sizes() == at::IntArrayRef({batch, after}), "key_mask: wanted one per key");
}

template <typename S, typename T = at::opmath_type<S>>
void attention_tokens(const Tensor& joint, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
                      const Tensor& mask, int64_t before, int64_t heads, const Tensor& read) {
  const int64_t batch = joint.size(0), steps = joint.size(1), groups = keys.size(1), width = keys.size(3);
  const RotaryTable<T> table(cos, sin, batch, steps);
  const NextTokens<S> next{heads_within<S>(joint, 0, width), heads_within<S>(joint, heads, width),
                           heads_within<S>(joint, heads + groups, width), &table, keys, values, before,
                           {batch, heads, groups, steps, before + steps, width, width}};
  const auto read_to = [&](T* to) {
    next.read(nullptr, in<bool>(mask), T(0), {to, steps * heads * width, width, heads * width});
  };
  if constexpr (std::is_same_v<S, T>) {
    read_to(out<S>(read));
  } else {
    const Room<T> wider(read.numel());
    read_to(wider);
    round_row(wider.data, read.numel(), out<S>(read));
  }
}

inline Tensor attention_step_cpu(const Tensor& joint, const Tensor& cos, const Tensor& sin, const Tensor& keys,
                                 const Tensor& values, const Maybe& key_mask, int64_t before, int64_t heads) {
  TORCH_CHECK_VALUE(joint.dim() == 3 && before >= 0 && keys.sizes() == values.sizes(), "joint, keys, values: shapes ",
                    joint.sizes(), ", ", keys.sizes(), " and ", values.sizes(), " do not belong together");
  const int64_t batch = joint.size(0), steps = joint.size(1), after = before + steps;
  check_cache(keys, values, key_mask, batch, after);
  const int64_t groups = keys.size(1), width = keys.size(3);
  TORCH_CHECK_VALUE(joint.size(2) == (heads + 2 * groups) * width && (groups ? heads % groups == 0 : heads == 0),
                    "joint: wanted ", heads, " + 2 * ", groups, " heads of ", width, ", got ", joint.sizes());
  const Tensor from = with_last_whole(joint), mask = key_mask ? key_mask->contiguous() : Tensor();
  Tensor read = at::empty({batch, steps, heads * width}, from.options());
  STORED(from, S, attention_tokens<S>(from, cos, sin, keys, values, mask, before, heads, read));
  return read;
}

// Averages of the values and of their exponentials, for a prior whose queries, keys and values are tensors of their own.
inline Tensor softmax_step_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& beta, const Maybe& cos,
                               const Maybe& sin, const Tensor& keys, const Tensor& values, const Maybe& key_mask,
                               int64_t before, double cap) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && before >= 0, "q, k, v: wanted B T C, got ", q.sizes(),
                    ", ", k.sizes(), " and ", v.sizes());
  const int64_t batch = q.size(0), steps = q.size(1), after = before + steps;
  check_cache(keys, values, key_mask, batch, after);
  const int64_t groups = keys.size(1), width = keys.size(3), channels = values.size(3);
  const int64_t heads = width ? q.size(2) / width : 0;
  TORCH_CHECK_VALUE(groups > 0 && q.size(2) == heads * width && heads % groups == 0 &&
                        k.sizes() == at::IntArrayRef({batch, steps, groups * width}) &&
                        v.sizes() == at::IntArrayRef({batch, steps, groups * channels}),
                    "q, k, v: shapes ", q.sizes(), ", ", k.sizes(), " and ", v.sizes(), " do not belong to a cache of ",
                    keys.sizes());
  TORCH_CHECK_VALUE(!beta || beta->sizes() == at::IntArrayRef({groups, channels}), "beta: wanted one per value head and ",
                    "channel");
  const Tensor x = with_last_whole(q), y = with_last_whole(k), u = with_last_whole(v);
  const Tensor rate = beta ? beta->contiguous() : Tensor(), mask = key_mask ? key_mask->contiguous() : Tensor();
  const int64_t signals = beta ? 2 : 1, row = signals * channels;
  Tensor mixed = at::empty({batch, steps, heads, signals, channels}, x.options().dtype(at::toOpMathType(x.scalar_type())));
  STORED(x, S, {
    using T = at::opmath_type<S>;
    const RotaryTable<T> table(cos, sin, batch, steps);
    const NextTokens<S> next{heads_within<S>(x, 0, width), heads_within<S>(y, 0, width), heads_within<S>(u, 0, channels),
                             &table, keys, values, before, {batch, heads, groups, steps, after, width, channels}};
    next.read(in<T>(rate), in<bool>(mask), T(cap), {out<T>(mixed), steps * heads * row, row, heads * row});
  });
  return mixed.transpose(1, 2);
}

}  // namespace helmholtz
