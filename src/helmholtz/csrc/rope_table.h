// cos and sin of position * theta^(-2i/width), both halves of a width alike, the sine's first half negated. Floor: two
// numbers written per pair; a step of a stream asks for one position, where a dozen calls from Python cost 25 us.
#pragma once

#include "common.h"

#include <map>
#include <mutex>

namespace helmholtz {

// theta^(-2i/width), made of the operations of the plain form, so that both give the same bits; once per process.
inline Tensor rotary_rates(int64_t width, double theta) {
  static std::map<std::pair<int64_t, double>, Tensor> known;
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  Tensor& rates = known[{width, theta}];
  if (!rates.defined()) {
    const c10::InferenceMode ordinary(false);
    rates = at::pow(at::Scalar(theta), at::neg(at::arange(0, width, 2, at::kFloat) / width));
  }
  return rates;
}

inline std::tuple<Tensor, Tensor> rope_table_cpu(const Tensor& positions, int64_t width, double theta) {
  const Tensor places = positions.to(at::kFloat).contiguous(), rates = rotary_rates(width, theta);
  const int64_t half = width / 2;
  std::vector<int64_t> shape = positions.sizes().vec();
  shape.push_back(width);
  Tensor cos = at::empty(shape, places.options()), sin = at::empty(shape, places.options());
  const Tensor angles = at::empty({positions.numel(), half}, places.options());
  const float *place = in<float>(places), *rate = in<float>(rates);
  float* angle = out<float>(angles);
  for (int64_t i = 0; i < positions.numel(); ++i, angle += half)
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) angle[j] = place[i] * rate[j];
  const Tensor c = at::cos(angles), s = at::sin(angles);
  const float *from_c = in<float>(c), *from_s = in<float>(s);
  float *to_c = out<float>(cos), *to_s = out<float>(sin);
  for (int64_t i = 0; i < positions.numel(); ++i, from_c += half, from_s += half, to_c += width, to_s += width) {
    std::copy_n(from_c, half, to_c);
    std::copy_n(from_c, half, to_c + half);
    std::copy_n(from_s, half, to_s + half);
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) to_s[j] = -from_s[j];
  }
  return {cos, sin};
}

}  // namespace helmholtz
