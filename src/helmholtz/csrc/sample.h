// The next token of each row by the inverse of its cumulative distribution, with top_k and top_p. Floor: one pass over
// the vocabulary for the softmax and one for the sum; ranks are taken from a heap, as far as they are asked for, where
// sorting the vocabulary costs ten times as much.
#pragma once

#include "common.h"

#include <algorithm>
#include <numeric>

namespace helmholtz {

// The least likely token that is kept; of equal ones the lower id is the likelier.
inline int64_t last_kept(const double* p, int64_t size, int64_t top_k, double top_p) {
  std::vector<int64_t> heap(size);
  std::iota(heap.begin(), heap.end(), 0);
  const auto behind = [p](int64_t a, int64_t b) { return p[a] < p[b] || (p[a] == p[b] && a > b); };
  std::make_heap(heap.begin(), heap.end(), behind);
  int64_t ranked = 0;  // tokens in order, from the end of the heap's memory
  const auto next = [&] {
    std::pop_heap(heap.begin(), heap.end() - ranked, behind);
    return heap[size - ++ranked];
  };
  const int64_t most = top_k > 0 ? std::min(top_k, size) : size;
  double mass = 0;
  if (top_k > 0) {
    for (int64_t i = 0; i < most; ++i) mass += p[next()];
    if (top_p <= 0) return heap[size - most];
  } else {
    mass = std::accumulate(p, p + size, 0.);
  }
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 1; i <= most; ++i) {
    const int64_t token = top_k > 0 ? heap[size - i] : next();
    const double share = p[token] / mass;
    sum += share;
    if (i > 1 && sum - share >= top_p) break;
    last = token;
  }
  return last;
}

// -1 of a distribution that is none.
inline int64_t draw_token(const double* p, int64_t size, double uniform, int64_t top_k, double top_p,
                          std::vector<double>& upto) {
  if (p[0] != p[0]) return -1;  // one NaN among the logits makes all of them NaN
  const int64_t last = top_k > 0 || top_p > 0 ? last_kept(p, size, top_k, top_p) : -1;
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (last < 0 || p[i] > p[last] || (p[i] == p[last] && i <= last)) sum += p[i];
    upto[i] = sum;
  }
  const auto drawn = std::upper_bound(upto.begin(), upto.end(), uniform * sum);
  const auto end = std::lower_bound(upto.begin(), upto.end(), sum);  // what follows adds nothing
  return std::min(drawn, end) - upto.begin();
}

inline int64_t likeliest(const double* x, int64_t size) {
  int64_t best = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (x[i] != x[i]) return -1;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

inline Tensor sample_cpu(const Tensor& logits, const Tensor& uniform, double temperature, int64_t top_k, double top_p) {
  const int64_t rows = logits.size(0), size = logits.size(1);
  Tensor x = logits.to(at::kDouble), tokens = at::empty({rows}, logits.options().dtype(at::kLong));
  if (temperature != 0 && temperature != 1) x = (x - x.amax(-1, true)) / temperature;
  const Tensor p = (temperature == 0 ? x : x.softmax(-1)).contiguous(), u = uniform.to(at::kDouble).contiguous();
  std::vector<double> upto(size);
  for (int64_t row = 0; row < rows; ++row) {
    const double* of = in<double>(p) + row * size;
    out<int64_t>(tokens)[row] = temperature == 0 ? likeliest(of, size)
                                                 : draw_token(of, size, in<double>(u)[row], top_k, top_p, upto);
  }
  return tokens;
}

}  // namespace helmholtz
