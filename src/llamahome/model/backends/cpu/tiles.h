// Register tiles of products of bfloat16 pairs (AVX512_BF16), and the orders in which they read their operands. Included by attention.h.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "numbers.h"
#include "pairs.h"

namespace {

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t parts(int64_t x, int64_t most) { return (x + most - 1) / most; }

// The rows of one head of one document; position -> token -> memory.
struct Rows {
  const bf16 *base;
  int64_t step, start, shared;
  const bf16 *at(int64_t position) const { return base + (position < shared ? position : start + position - shared) * step; }
};

template <class X>
struct Room {  // aligned memory of one thread
  X *at;
  explicit Room(int64_t count) : at((X *)aligned_alloc(64, up(std::max<int64_t>(count, 1) * sizeof(X), 64))) {}
  Room(const Room &) = delete;
  ~Room() { free(at); }
};

// 2^x; relative error 3e-6, a thousandth of what the following rounding to bfloat16 costs.
inline __m512 power(__m512 x) {
  __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.353416672e-2f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146291e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414427555e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930038347e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000002593f));
  return _mm512_scalef_ps(p, x);
}

inline void put16(bf16 *place, __m512 x) { _mm256_storeu_si256((__m256i *)place, (__m256i)_mm512_cvtneps_pbh(x)); }

inline void copy_row(const bf16 *row, int64_t size, pair *to) {
  for (int64_t i = 0; i < size; i += 16) _mm256_store_si256((__m256i *)((bf16 *)to + i), _mm256_loadu_si256((const __m256i *)(row + i)));
}

// log2(x) for positive normal x; absolute error 3e-7.
inline __m512 logarithm(__m512 x) {
  __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), one = _mm512_set1_ps(1.0f);
  __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(t, t);
  __m512 p = _mm512_fmadd_ps(square, _mm512_set1_ps(2.885390082f / 7), _mm512_set1_ps(2.885390082f / 5));
  p = _mm512_fmadd_ps(square, p, _mm512_set1_ps(2.885390082f / 3));
  p = _mm512_fmadd_ps(square, p, _mm512_set1_ps(2.885390082f));
  return _mm512_fmadd_ps(t, p, _mm512_getexp_ps(_mm512_div_ps(x, m)));
}

// to[R][16 N] (+)= a * b over `pairs` steps; steps of a and b in pairs: between rows, to the next pair, between vectors.
template <int R, int N, bool add>
void product(const pair *a, int64_t a_row, int64_t a_next, const pair *b, int64_t b_next, int64_t b_vector, int64_t pairs, float *to,
                    int64_t to_row) {
  __m512 sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[r][n] = add ? _mm512_loadu_ps(to + r * to_row + n * 16) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; p++) {
    __m512i wide[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) wide[n] = _mm512_loadu_si512(b + n * b_vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __m512i one = _mm512_set1_epi32(int(a[r * a_row]));
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], (__m512bh)one, (__m512bh)wide[n]);
    }
    a += a_next;
    b += b_next;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) _mm512_storeu_ps(to + r * to_row + n * 16, sum[r][n]);
}

// The same for any number of vectors, at most four at a time.
template <int R, bool add>
void products(const pair *a, int64_t a_row, int64_t a_next, const pair *b, int64_t b_next, int64_t b_vector, int64_t pairs, float *to,
                     int64_t to_row, int64_t vectors) {
  for (int64_t left = parts(vectors, 4); left > 0; left--) {
    int64_t n = parts(vectors, left);
    auto one = n == 4 ? product<R, 4, add> : n == 3 ? product<R, 3, add> : n == 2 ? product<R, 2, add> : product<R, 1, add>;
    one(a, a_row, a_next, b, b_next, b_vector, pairs, to, to_row);
    b += n * b_vector, to += n * 16, vectors -= n;
  }
}

// [keys / 16][size / 2][16 keys] pairs of neighbouring numbers of a row; rows from `stop` on are zero. Returns nothing beyond `keys`.
inline void pack_rows(const Rows &rows, int64_t first, int64_t keys, int64_t stop, int64_t size, pair *to) {
  for (int64_t chunk = 0; chunk < keys; chunk += 16, to += size * 8)
    for (int64_t at = 0; at < size / 2; at += 16) {
      __m512i a[16];
      __mmask16 some = size / 2 - at >= 16 ? 0xffff : 0xff;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        int64_t position = first + chunk + i;
        a[i] = _mm512_maskz_loadu_epi32(position < stop ? some : 0, (const pair *)rows.at(position < stop ? position : first) + at);
      }
      turn(a);
      for (int i = 0; i < (some == 0xff ? 8 : 16); i++) _mm512_storeu_si512(to + (at + i) * 16, a[i]);
    }
}

// [keys / 2][size] pairs of neighbouring rows; rows from `stop` on are zero.
inline void pack_pairs(const Rows &rows, int64_t first, int64_t keys, int64_t stop, int64_t size, pair *to) {
  for (int64_t key = 0; key < keys; key += 2, to += size) {
    __mmask16 low = first + key < stop ? 0xffff : 0, high = first + key + 1 < stop ? 0xffff : 0;
    const bf16 *a = rows.at(low ? first + key : first), *b = rows.at(high ? first + key + 1 : first);
    for (int64_t i = 0; i < size; i += 16) _mm512_storeu_si512(to + i, braid(a + i, low, b + i, high));
  }
}

}  // namespace
