// Small matrix products for kernels that work in blocks: C (+)= A B, with B packed in panels, or in rows as it lies where
// it fits a core's nearest cache. Measured at the processor's
// peak (AMD Zen 5, one core: 256 of 256 GFLOP/s in float32, where MKL reaches 105; 500 in bf16). bf16 operands come in pairs along the
// contraction, as the instruction that multiplies them wants them; without it they are widened in registers.
#pragma once

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace helmholtz {

#if defined(__AVX512F__)
constexpr int64_t VECTOR = 64, TILE = 8;  // bytes of a register; rows of C that are worked on at once
#elif defined(__AVX2__)
constexpr int64_t VECTOR = 32, TILE = 4;
#else
constexpr int64_t VECTOR = 16, TILE = 4;
#endif

template <typename S>
constexpr bool PAIRED = std::is_same_v<S, at::BFloat16>;
// What one multiply-add takes of an operand: a number, or two bf16 side by side.
template <typename S>
using Unit = std::conditional_t<PAIRED<S>, uint32_t, S>;
template <typename S>
constexpr int64_t DEPTH = PAIRED<S> ? 2 : 1;
// Columns of a panel: two registers of what is summed.
template <typename S>
constexpr int64_t PANEL = 2 * VECTOR / static_cast<int64_t>(sizeof(at::opmath_type<S>));

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
struct RegisterOf {
  typedef T type __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Register = typename RegisterOf<T>::type;

// As S holds it: bits of a float whose lower half is 0, or the number itself.
INLINE float rounded(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return std::bit_cast<float>(x == x ? up : 0x7fc00000u);
}
template <typename S, typename T>
INLINE T stored(T x) {
  if constexpr (PAIRED<S>) return rounded(x);
  return x;
}

// Numbers that are `stored` already, as S.
template <typename S, typename T>
void narrow_row(const T* x, int64_t n, S* to) {
  if constexpr (PAIRED<S>) {
    auto* bits = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(x[i]) >> 16);
  } else if (x != to) {
    std::copy_n(x, n, to);
  }
}

// Rows on top of each other by DEPTH, as the left operand of a product that sums over rows wants them.
inline void stack_rows(const float* x, int64_t stride, int64_t rows, int64_t columns, uint32_t* to, int64_t apart) {
  for (int64_t i = 0; i < rows; i += 2, to += apart) {
    const float *one = x + i * stride, *two = one + stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j)
      to[j] = std::bit_cast<uint32_t>(one[j]) >> 16 | (std::bit_cast<uint32_t>(two[j]) & 0xffff0000u);
  }
}

#define UNROLLED _Pragma("GCC unroll 16")

// The left operand: element (i, k) at data[i * row + k * step], in units. A transposed matrix swaps the two.
template <typename S>
struct Left {
  const Unit<S>* data;
  int64_t row, step;
};

// The right operand: its rows are `row` units apart, its panels `panel`.
template <typename S>
struct Right {
  const Unit<S>* data;
  int64_t row, panel;
};

template <bool ADD, int V, typename T>
INLINE void put(T* c, int64_t stride, const Register<T> (&sums)[TILE][V]) {
  constexpr int64_t LANES = VECTOR / sizeof(T);
  UNROLLED for (int64_t i = 0; i < TILE; ++i) {
    UNROLLED for (int64_t n = 0; n < V; ++n) {
      auto& to = *reinterpret_cast<Register<T>*>(c + i * stride + n * LANES);
      to = ADD ? to + sums[i][n] : sums[i][n];
    }
  }
}

// TILE rows times V registers of columns, at most a panel; `row` from one row of B to the next.
template <typename S, bool ADD, int V, typename T = at::opmath_type<S>>
INLINE void tile(Left<S> a, const Unit<S>* b, int64_t row, T* c, int64_t stride, int64_t depth) {
  constexpr int64_t LANES = VECTOR / sizeof(T);
  Register<T> sums[TILE][V] = {};
  for (int64_t k = 0; k < depth; ++k, b += row) {
    if constexpr (PAIRED<S>) {
      Register<T> evens[V], odds[V];
      UNROLLED for (int64_t n = 0; n < V; ++n) {
        const auto pairs = *reinterpret_cast<const Register<uint32_t>*>(b + n * LANES);
        evens[n] = reinterpret_cast<Register<T>>(pairs << 16), odds[n] = reinterpret_cast<Register<T>>(pairs & 0xffff0000u);
      }
      UNROLLED for (int64_t i = 0; i < TILE; ++i) {
        const uint32_t pair = a.data[i * a.row + k * a.step];
        const T even = std::bit_cast<float>(pair << 16), odd = std::bit_cast<float>(pair & 0xffff0000u);
        UNROLLED for (int64_t n = 0; n < V; ++n) sums[i][n] += even * evens[n] + odd * odds[n];
      }
    } else {
      Register<T> numbers[V];
      UNROLLED for (int64_t n = 0; n < V; ++n) numbers[n] = *reinterpret_cast<const Register<T>*>(b + n * LANES);
      UNROLLED for (int64_t i = 0; i < TILE; ++i) {
        const T x = a.data[i * a.row + k * a.step];
        UNROLLED for (int64_t n = 0; n < V; ++n) sums[i][n] += x * numbers[n];
      }
    }
  }
  put<ADD, V, T>(c, stride, sums);
}

#if defined(__AVX512F__)
// The same with the processor's product of pairs, which no compiler finds by itself.
template <bool ADD>
__attribute__((target("avx512bf16"))) void tile_of_pairs(Left<at::BFloat16> a, const uint32_t* b, float* c,
                                                         int64_t stride, int64_t depth) {
  __m512 sums[TILE][2];
  UNROLLED for (int64_t i = 0; i < TILE; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, b += 32) {
    const auto first = (__m512bh)_mm512_loadu_si512(b), second = (__m512bh)_mm512_loadu_si512(b + 16);
    UNROLLED for (int64_t i = 0; i < TILE; ++i) {
      const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a.data[i * a.row + k * a.step]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, first);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, second);
    }
  }
  UNROLLED for (int64_t i = 0; i < TILE; ++i) {
    UNROLLED for (int64_t n = 0; n < 2; ++n) {
      float* to = c + i * stride + 16 * n;
      _mm512_storeu_ps(to, ADD ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][n]) : sums[i][n]);
    }
  }
}

inline bool multiplies_pairs() {
  static const bool known = __builtin_cpu_supports("avx512bf16");
  return known;
}
#endif

// What of a product is not 0, or is wanted.
enum class Part { ALL, LOWER_RESULT, LOWER_LEFT, UPPER_LEFT };

// C (+)= A B. `rows` is a multiple of TILE, columns are those of whole registers, of the contraction the first `depth`
// units are taken.
template <typename S, bool ADD, Part PART = Part::ALL, typename T = at::opmath_type<S>>
void product(Left<S> a, Right<S> b, T* c, int64_t stride, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t n = 0; n < columns; n += PANEL<S>, b.data += b.panel) {
    for (int64_t i = PART == Part::LOWER_RESULT ? n : 0; i < rows; i += TILE) {
      const int64_t from = PART == Part::UPPER_LEFT ? i : 0;
      const int64_t here = (PART == Part::LOWER_LEFT ? std::min(i + TILE, depth) : depth) - from;
      const Left<S> left{a.data + i * a.row + from * a.step, a.row, a.step};
      const Unit<S>* right = b.data + from * b.row;
      T* to = c + i * stride + n;
#if defined(__AVX512F__)
      if constexpr (PAIRED<S>) {
        if (multiplies_pairs()) {
          tile_of_pairs<ADD>(left, right, to, stride, here);
          continue;
        }
      }
#endif
      const int64_t wanted = PART == Part::LOWER_RESULT ? std::min(i + TILE, columns) : columns;
      if (!PAIRED<S> && wanted - n <= PANEL<S> / 2) tile<S, ADD, 1>(left, right, b.row, to, stride, here);
      else tile<S, ADD, 2>(left, right, b.row, to, stride, here);
    }
  }
}

// The same with packed panels, each of `whole` rows.
template <typename S, bool ADD, typename T = at::opmath_type<S>>
void product(Left<S> a, const Unit<S>* panels, int64_t whole, T* c, int64_t stride, int64_t rows, int64_t columns,
             int64_t depth) {
  product<S, ADD>(a, Right<S>{panels, PANEL<S>, whole * PANEL<S>}, c, stride, rows, columns, depth);
}

// Panels of B with B[k][n] = x[k][n]. Rows beyond those of x are 0; x has whole panels of columns.
template <typename S>
void pack_rows(const S* x, int64_t stride, int64_t rows, int64_t columns, Unit<S>* panels, int64_t whole) {
  for (int64_t n = 0; n < columns; n += PANEL<S>) {
    for (int64_t k = 0; k < whole; ++k, panels += PANEL<S>) {
      const S* from = x + k * DEPTH<S> * stride + n;
      if constexpr (PAIRED<S>) {
        const bool one = 2 * k < rows, two = 2 * k + 1 < rows;
        for (int64_t i = 0; i < PANEL<S>; ++i)
          panels[i] = (one ? from[i].x : 0u) | static_cast<uint32_t>(two ? from[stride + i].x : 0u) << 16;
      } else {
        for (int64_t i = 0; i < PANEL<S>; ++i) panels[i] = k < rows ? from[i] : S(0);
      }
    }
  }
}

// Panels of B with B[k][n] = x[n][k]: x has `whole` units a row. Columns beyond the rows of x are 0.
template <typename S>
void pack_transposed(const S* x, int64_t stride, int64_t rows, Unit<S>* panels, int64_t whole) {
  const auto* units = reinterpret_cast<const Unit<S>*>(x);
  for (int64_t n = 0; n < rows; n += PANEL<S>) {
    const int64_t here = std::min(PANEL<S>, rows - n);
    for (int64_t k = 0; k < whole; ++k, panels += PANEL<S>) {
      const Unit<S>* from = units + n * (stride / DEPTH<S>) + k;
      for (int64_t i = 0; i < here; ++i) panels[i] = from[i * (stride / DEPTH<S>)];
      for (int64_t i = here; i < PANEL<S>; ++i) panels[i] = 0;
    }
  }
}

// Matrices that lie as they are, rows and columns padded to a multiple of this.
constexpr int64_t PADDED = 16;
inline int64_t padded(int64_t n) { return round_up(n, PADDED); }

template <typename T>
Left<T> rows(const T* data, int64_t width) {
  return {data, width, 1};
}
template <typename T>
Left<T> columns(const T* data, int64_t width) {  // the transpose of `rows`
  return {data, 1, width};
}

// c (+)= a b: m by width from m by depth and depth by width.
template <bool ADD, Part PART = Part::ALL, typename T>
void multiply(int64_t m, int64_t depth, int64_t width, Left<T> a, const T* b, T* c) {
  product<T, ADD, PART>(a, Right<T>{b, width, PANEL<T>}, c, width, m, width, depth);
}

template <typename T>
void transpose(const T* from, T* to, int64_t m, int64_t n) {  // m by n
  for (int64_t i = 0; i < m; i += PADDED)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t r = 0; r < PADDED; ++r) to[j * m + i + r] = from[(i + r) * n + j];
}

}  // namespace helmholtz
