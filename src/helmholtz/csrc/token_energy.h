// What is element-wise in the map and the energy of a token: between W z, M z and the products back, which stay torch's.
// Floor: 4 E + K + 2 D numbers read and E + K written per token; 3 exp and 1 log per channel, 1 exp per pattern.
// A solver asks without gradients, and the plain form has them: there is no backward pass.
#pragma once

#include "common.h"

namespace helmholtz {

INLINE float tanh_of(float x) {
  const float y = std::abs(x), e = exp_of(-2.f * y), z = x * x;
  float p = -5.70498872745e-3f;  // Cephes, below 0.625: 1 ulp
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return y < 0.625f ? p * z * x + x : std::copysign((1.f - e) / (1.f + e), x);
}
INLINE double tanh_of(double x) { return std::tanh(x); }

// sinh(h) / h and cosh(h) of z = h^2 <= 1/4: their series, to half an ulp; a loop over the coefficients is no vector code.
template <typename T>
INLINE T sinhc_of(T z) {
  const T high = T(1. / 362880) + z * (T(1. / 39916800) + z * T(1. / 6227020800));
  return T(1) + z * (T(1. / 6) + z * (T(1. / 120) + z * (T(1. / 5040) + z * high)));
}
template <typename T>
INLINE T cosh_of(T z) {
  const T high = T(1. / 40320) + z * (T(1. / 3628800) + z * (T(1. / 479001600) + z * T(1. / 87178291200)));
  return T(1) + z * (T(1. / 2) + z * (T(1. / 24) + z * (T(1. / 720) + z * high)));
}

// [log cosh(a + x) - log cosh a] / x without a difference of large numbers, tanh a at x = 0.
//   |x| <= 1: log1p(y) / x with y = 2 sinh(x/2) (sinh(x/2) + tanh a cosh(x/2)); the rounding of u = 1 + y is divided out.
//   beyond: log cosh y = |y| + log(1 + e^(-2|y|)) - log 2.
template <typename T>
INLINE T slope_of_log_cosh(T a, T x) {
  const bool near = std::abs(x) <= T(1);
  const T h = near ? x / 2 : T(0), ratio = sinhc_of(h * h), sinh = ratio * h;
  const T factor = ratio * (sinh + tanh_of(a) * cosh_of(h * h)), u = T(1) + x * factor, d = u - T(1);
  const T size = std::abs(a), along = a < T(0) ? -x : x, back = -along - 2 * size;  // |a + x| - |a| is the larger one
  const T quotient = (T(1) + exp_of(-2 * std::abs(a + x))) / (T(1) + exp_of(-2 * size));
  const T log = log_of(near ? u : quotient);
  const T slope = d == T(0) ? factor : factor * (log / d);
  return near ? slope : ((along > back ? along : back) + log) / x;
}

// A sum in pieces, so that its error does not grow with its length.
template <typename T, typename F>
INLINE double sum_of(int64_t size, const F& term) {
  double total = 0;
  for (int64_t first = 0; first < size; first += 512) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < std::min(first + 512, size); ++i) part += term(i);
    total += part;
  }
  return total;
}

// The softmax of a row times `factor`, 0 where all patterns are empty; returns the potential.
template <typename T>
double retrieve(const T* overlaps, const T* log_prior, int64_t patterns, int64_t active, T beta, T factor, T* to) {
  if (active == 0) {
    std::fill_n(to, patterns, T(0));
    return 0;
  }
  T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < patterns; ++k) {
    to[k] = beta * overlaps[k] + (log_prior == nullptr ? T(0) : log_prior[k]);
    top = to[k] > top ? to[k] : top;
  }
#pragma omp simd
  for (int64_t k = 0; k < patterns; ++k) to[k] = exp_of(to[k] - top);
  const double sum = sum_of<T>(patterns, [&](int64_t k) { return to[k]; });
  const T scale = static_cast<T>(factor / sum);
#pragma omp simd
  for (int64_t k = 0; k < patterns; ++k) to[k] *= scale;
  return (std::log(sum / static_cast<double>(active)) + top) / beta;
}

constexpr int64_t ENERGY_ROWS = 4;  // tokens of a piece of work

template <typename T>
void evaluate_rows(const Tensor (&given)[6], const Tensor& overlaps, const Tensor& log_prior, T kappa, T strength,
                   T beta, const Tensor& emitted, const Tensor& weights, const Tensor& energy) {
  const int64_t rows = given[0].size(0), width = given[0].size(1), channels = given[2].size(1), patterns = overlaps.size(1);
  const T* prior = in<T>(log_prior);
  const int64_t active = prior == nullptr ? patterns : std::count_if(prior, prior + patterns, [](T x) { return x != -INFINITY; });
  each((rows + ENERGY_ROWS - 1) / ENERGY_ROWS, [&](int64_t part) {
    for (int64_t n = part * ENERGY_ROWS; n < std::min((part + 1) * ENERGY_ROWS, rows); ++n) {
      const T *z = in<T>(given[0]) + n * width, *u = in<T>(given[1]) + n * width;
      const T *a = in<T>(given[2]) + n * channels, *gate = in<T>(given[3]) + n * channels;
      const T *delta = in<T>(given[4]) + n * channels, *drive = in<T>(given[5]) + n * channels;
      T* to = out<T>(emitted) + n * channels;
#pragma omp simd
      for (int64_t e = 0; e < channels; ++e) to[e] = gate[e] * drive[e] * slope_of_log_cosh(a[e], delta[e] * drive[e]);
      const double field = sum_of<T>(channels, [to](int64_t e) { return to[e]; });
#pragma omp simd
      for (int64_t e = 0; e < channels; ++e) to[e] = kappa * gate[e] * tanh_of(a[e] + delta[e] * drive[e]);
      const double square = sum_of<T>(width, [&](int64_t i) { return z[i] * z[i]; });
      const double pull = sum_of<T>(width, [&](int64_t i) { return u[i] * z[i]; });
      const double potential = retrieve(in<T>(overlaps) + n * patterns, prior, patterns, active, beta, strength,
                                        out<T>(weights) + n * patterns);
      out<T>(energy)[n] = static_cast<T>(square / 2 - pull - kappa * field - strength * potential);
    }
  }, ENERGY_ROWS * (channels + patterns) * 8);
}

// kappa gamma tanh(a + delta W z) and strength softmax(beta M z + b), which W and M turn into the map, and the energy.
inline std::tuple<Tensor, Tensor, Tensor> token_energy_cpu(
    const Tensor& z, const Tensor& u, const Tensor& a, const Tensor& gate, const Tensor& delta, const Tensor& drive,
    const Tensor& overlaps, const Maybe& log_prior, const Tensor& kappa, const Tensor& strength, double beta) {
  const Tensor given[6] = {z.contiguous(), u.contiguous(), a.contiguous(), gate.contiguous(), delta.contiguous(), drive.contiguous()};
  const Tensor scores = overlaps.contiguous(), prior = log_prior ? log_prior->contiguous() : Tensor();
  Tensor emitted = at::empty(given[5].sizes(), z.options()), weights = at::empty(scores.sizes(), z.options());
  Tensor energy = at::empty({z.size(0)}, z.options());
  FLOATING(z, T, evaluate_rows<T>(given, scores, prior, *in<T>(kappa), *in<T>(strength), static_cast<T>(beta), emitted, weights, energy));
  return {emitted, weights, energy};
}

}  // namespace helmholtz
