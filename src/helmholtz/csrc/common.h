// What the kernels share: tensors as pointers with strides, loops over threads whose result does not depend on their
// number, and exp and log that a compiler turns into vector code.
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <optional>
#include <vector>

namespace helmholtz {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

#define INLINE inline __attribute__((always_inline))

// exp as 2^n times a polynomial of the rest (Cody & Waite's two-step reduction, Cephes' coefficients): 2 ulp, 0 from
// below -104 on, infinite above 89; NaN stays NaN.
INLINE float exp_of(float x) {
  float y = x < -104.f ? -104.f : x;
  y = y > 89.f ? 89.f : y;
  const float n = __builtin_rintf(y * 1.44269504088896341f);
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const int k = static_cast<int>(n), half = k >> 1;  // in two factors: 2^k alone would not reach the denormals
  return p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((k - half + 127) << 23);
}

// log of a positive number by fdlibm's series in s = f / (2 + f), with 1 + f the mantissa in [sqrt(1/2), sqrt(2)): 1 ulp.
INLINE float log_of(float x) {
  const bool tiny = x < FLT_MIN;
  const int bits = std::bit_cast<int>(tiny ? x * 33554432.f : x) + (0x3f800000 - 0x3f3504f3);
  const float k = static_cast<float>((bits >> 23) - 127 - (tiny ? 25 : 0));
  const float f = std::bit_cast<float>((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  const float s = f / (2.f + f), z = s * s, w = z * z, half = 0.5f * f * f;
  const float rest = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const float y = k * 6.9313812256e-01f - ((half - (s * (half + rest) + k * 9.0580006145e-06f)) - f);
  return x < INFINITY ? y : x;  // infinity and NaN as they are
}

INLINE double exp_of(double x) { return std::exp(x); }
INLINE double log_of(double x) { return std::log(x); }

// log(1 + e) for e in [0, 1]: the rounding of 1 + e is divided out (Kahan).
template <typename T>
INLINE T log1p_of(T e) {
  const T u = T(1) + e, d = u - T(1);
  return d == T(0) ? e : log_of(u) * (e / d);
}

template <typename T>
INLINE T sigmoid_of(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

template <typename T>
INLINE T softplus_of(T x) {
  return (x > T(0) ? x : T(0)) + log1p_of(exp_of(x > T(0) ? -x : x));
}

// `parts` pieces of work in any order on torch's threads. What pieces add up goes to a row per piece, summed in order
// afterwards, so that no number of threads changes a result. `size` of a piece, in numbers: what is too little for a second
// thread, as a step of a stream, stays on one.
template <typename F>
void each(int64_t parts, const F& work, int64_t size = at::internal::GRAIN_SIZE) {
  at::parallel_for(0, parts, std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, size)), [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) work(part);
  });
}

// The caller's dtype as a type: FLOATING(x, T, work<T>(...)). Loops stand outside, as a macro takes no pragma.
#define FLOATING(x, T, ...)                                                 \
  AT_DISPATCH_FLOATING_TYPES((x).scalar_type(), "helmholtz", [&] {          \
    using T = scalar_t;                                                     \
    __VA_ARGS__;                                                            \
  })

// Numbers as tensors hold them: bf16 is widened before every computation and rounded once, to nearest even, after it.
// Written out, as a compiler turns these into vector code, not c10's branches on NaN.
INLINE float wide(float x) { return x; }
INLINE double wide(double x) { return x; }
INLINE float wide(at::BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

template <typename S, typename T>
INLINE S narrow(T x) {
  if constexpr (std::is_same_v<S, at::BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return at::BFloat16(static_cast<uint16_t>(x == x ? rounded : 0x7fc0u), at::BFloat16::from_bits());
  } else {
    return x;
  }
}

// As FLOATING, for kernels that read and write bf16 as well: S is what memory holds, at::opmath_type<S> what they
// compute in.
#define STORED(x, S, ...)                                                       \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, (x).scalar_type(), "helmholtz", [&] { \
    using S = scalar_t;                                                         \
    __VA_ARGS__;                                                                \
  })

template <typename T>
const T* in(const Tensor& x) {
  return x.defined() ? x.const_data_ptr<T>() : nullptr;
}
template <typename T>
T* out(const Tensor& x) {
  return x.defined() ? x.mutable_data_ptr<T>() : nullptr;
}

// The operator of that name below autograd, looked up once.
#define OPERATOR(name, signature) \
  c10::Dispatcher::singleton().findSchemaOrThrow("helmholtz::" name, "").typed<signature>()

inline Tensor defined(const Maybe& x) { return x.has_value() ? *x : Tensor(); }
inline Maybe maybe(const Tensor& x) { return x.defined() ? Maybe(x) : std::nullopt; }

// A gradient that autograd leaves out is 0. Functions of several outputs ask for none to be filled in
// (set_materialize_grads): zeros for what only the backward pass reads would be of its size.
inline Tensor or_zeros(const Tensor& grad, const Tensor& like) { return grad.defined() ? grad : at::zeros_like(like); }
inline Tensor or_zeros(const Maybe& grad, const Tensor& like) { return or_zeros(defined(grad), like); }

}  // namespace helmholtz
