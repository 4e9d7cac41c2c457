// Products of small matrices that lie in a core's cache, rows padded to whole vectors. Vectors are the compiler's own
// (GCC, Clang), split where the processor has narrower ones. Floor: a fused multiply-add per vector.
#pragma once

#include "common.h"

#include <cstring>

namespace helmholtz {

#ifdef __AVX512F__
constexpr int64_t VECTOR_BYTES = 64, TILE_ROWS = 8;
#else
constexpr int64_t VECTOR_BYTES = 32, TILE_ROWS = 4;
#endif
constexpr int64_t PADDED = 16;  // rows and columns of every matrix are a multiple of this

inline int64_t padded(int64_t n) { return (n + PADDED - 1) / PADDED * PADDED; }

template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};

// A matrix whose element (i, j) lies at i row + j column.
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;
};
template <typename T>
Strided<T> rows(const T* data, int64_t width) {
  return {data, width, 1};
}
template <typename T>
Strided<T> columns(const T* data, int64_t width) {  // the transpose of `rows`
  return {data, 1, width};
}

enum class Part { ALL, LOWER_RESULT, LOWER_LEFT, UPPER_LEFT };  // what of a product is not 0, or is wanted

template <typename T, int R, int V>
INLINE void tile(int64_t from, int64_t to, const Strided<T>& a, int64_t i, const T* b, T* c, int64_t width, bool add) {
  using Vector = typename Lanes<T>::type;
  constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
  Vector sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      sum[r][v] = Vector{};
      if (add) std::memcpy(&sum[r][v], c + r * width + v * lanes, VECTOR_BYTES);
    }
  for (int64_t k = from; k < to; ++k) {
    Vector y[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(&y[v], b + k * width + v * lanes, VECTOR_BYTES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T x = a.data[(i + r) * a.row + k * a.column];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += x * y[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) std::memcpy(c + r * width + v * lanes, &sum[r][v], VECTOR_BYTES);
}

// c = a b, or c += a b: m by width from m by depth and depth by width, all padded.
template <typename T>
void product(int64_t m, int64_t depth, int64_t width, Strided<T> a, const T* b, T* c, bool add, Part part = Part::ALL) {
  constexpr int64_t lanes = VECTOR_BYTES / sizeof(T);
  for (int64_t i = 0; i < m; i += TILE_ROWS) {
    const int64_t end = i + TILE_ROWS;
    const int64_t from = part == Part::UPPER_LEFT ? i : 0, to = part == Part::LOWER_LEFT ? std::min(end, depth) : depth;
    const int64_t wide = part == Part::LOWER_RESULT ? std::min((end + lanes - 1) / lanes * lanes, width) : width;
    int64_t j = 0;
    for (; j + 2 * lanes <= wide; j += 2 * lanes)
      tile<T, TILE_ROWS, 2>(from, to, a, i, b + j, c + i * width + j, width, add);
    for (; j < wide; j += lanes) tile<T, TILE_ROWS, 1>(from, to, a, i, b + j, c + i * width + j, width, add);
  }
}

template <typename T>
void transpose(const T* from, T* to, int64_t m, int64_t n) {  // m by n
  for (int64_t i = 0; i < m; i += PADDED)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t r = 0; r < PADDED; ++r) to[j * m + i + r] = from[(i + r) * n + j];
}

}  // namespace helmholtz
