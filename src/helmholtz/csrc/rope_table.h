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
  const Tensor angles = (positions.to(at::kFloat).unsqueeze(-1) * rotary_rates(width, theta)).contiguous();
  const Tensor c = angles.cos(), s = angles.sin();
  std::vector<int64_t> shape = positions.sizes().vec();
  shape.push_back(width);
  Tensor cos = at::empty(shape, angles.options()), sin = at::empty(shape, angles.options());
  const int64_t half = width / 2;
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
