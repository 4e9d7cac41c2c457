// The next tokens of a stream in one call: queries and keys turned, keys and values written behind those that a cache
// holds, and the read of all of them. Floor: the cache read once, 2 numbers per token, group and channel; at the length of
// a prompt that is less than the calls from Python, which are one here and were twelve.
#pragma once

#include "rope.h"
#include "softmax_read.h"

namespace helmholtz {

// A kernel writes past torch's own record of changes, by which autograd finds that what it kept is no longer there.
inline void note_change(const Tensor& x) {
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

inline Tensor attention_step_cpu(const Tensor& joint, const Tensor& cos, const Tensor& sin, const Tensor& keys,
                                 const Tensor& values, const Maybe& key_mask, int64_t before, int64_t heads) {
  TORCH_CHECK_VALUE(joint.dim() == 3 && keys.dim() == 4 && keys.sizes() == values.sizes(), "joint, keys, values: shapes ",
                    joint.sizes(), ", ", keys.sizes(), " and ", values.sizes(), " do not belong together");
  const int64_t batch = joint.size(0), steps = joint.size(1), groups = keys.size(1), width = keys.size(3);
  TORCH_CHECK_VALUE(keys.size(0) == batch && joint.size(2) == (heads + 2 * groups) * width && before >= 0 &&
                        before + steps <= keys.size(2) && keys.stride(3) == 1 && values.stride(3) == 1,
                    "keys: no room for ", joint.sizes(), " behind ", before, " tokens in ", keys.sizes());
  const auto wide = at::toOpMathType(joint.scalar_type());
  const Tensor from = joint.reshape({batch, steps, heads + 2 * groups, width});
  const Tensor c = table_of(batch, steps, cos.to(wide)), s = table_of(batch, steps, sin.to(wide));
  const Tensor q = at::empty({batch, heads, steps, width}, from.options());
  const Tensor k = keys.narrow(2, 0, before + steps), v = values.narrow(2, 0, before + steps);
  const Tensor mixed = at::empty({batch, steps, heads, 1, width}, from.options().dtype(wide)).transpose(1, 2);
  const Tensor lse = at::empty({batch, heads, steps}, mixed.options());
  const Tensor mask = key_mask ? key_mask->contiguous() : Tensor();
  check_shapes(q, k, v, std::nullopt, key_mask);
  STORED(from, S, {
    rope_all<S, false>(from, c, s, {q, k.narrow(2, before, steps), v.narrow(2, before, steps)});
    softmax_read_all<S>(SoftmaxRead<S>(q, k, v, Tensor(), mask, Tensor(), true, 0.), mixed, lse);
  });
  note_change(keys);
  note_change(values);
  return mixed.transpose(1, 2).reshape({batch, steps, heads * width}).to(joint.scalar_type());
}

}  // namespace helmholtz
