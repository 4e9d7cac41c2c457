// Tensors B T H V as rows of V numbers that lie anywhere: slices of a projection, heads before or after time.
#pragma once

#include "common.h"

namespace helmholtz {

// Rows of one tensor B T H ...: the last dimension lies side by side, the first three anywhere.
template <typename S>
struct Rows {
  S* data;
  int64_t b, t, h;
  S* at(int64_t i, int64_t j, int64_t k) const { return data + i * b + j * t + k * h; }
};

template <typename S>
Rows<const S> rows_of(const Tensor& x) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  return {x.const_data_ptr<S>(), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename S>
Rows<S> new_rows(const Tensor& x) {
  if (!x.defined()) return {nullptr, 0, 0, 0};
  return {x.mutable_data_ptr<S>(), x.stride(0), x.stride(1), x.stride(2)};
}

inline Tensor with_whole_rows(const Tensor& x) { return !x.defined() || x.stride(-1) == 1 ? x : x.contiguous(); }

// The channels of all heads of a token in one loop, also where a head's do not fill a vector: `wide_heads` fetches them
// side by side, `narrow_heads` puts them back.
struct HeadSizes {
  int64_t count, width;
  int64_t channels() const { return count * width; }
  int64_t padded() const { return (channels() + 15) / 16 * 16; }  // whole vectors
};

template <typename T, typename S>
void wide_heads(Rows<const S> from, int64_t b, int64_t t, HeadSizes heads, T* to) {
  if (from.h == heads.width) heads = {1, heads.channels()};
  for (int64_t h = 0; h < heads.count; ++h, to += heads.width) {
    const S* row = from.data + b * from.b + t * from.t + h * from.h;
#pragma omp simd
    for (int64_t v = 0; v < heads.width; ++v) to[v] = wide(row[v]);
  }
}

template <typename T, typename S>
void narrow_heads(const T* from, Rows<S> to, int64_t b, int64_t t, HeadSizes heads) {
  if (to.h == heads.width) heads = {1, heads.channels()};
  for (int64_t h = 0; h < heads.count; ++h, from += heads.width) {
    S* row = to.data + b * to.b + t * to.t + h * to.h;
#pragma omp simd
    for (int64_t v = 0; v < heads.width; ++v) row[v] = narrow<S>(from[v]);
  }
}

// The dtypes of what is computed and of what is stored as types: float32 beside bf16, or one for both.
#define COMPUTED(x, stored, T, S, ...)       \
  if ((stored) == at::kBFloat16) {           \
    using T = float;                         \
    using S = at::BFloat16;                  \
    __VA_ARGS__;                             \
  } else {                                   \
    FLOATING(x, T, using S = T; __VA_ARGS__); \
  }

}  // namespace helmholtz
