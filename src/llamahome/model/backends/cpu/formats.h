// What the operands of a product are made of: single float32 numbers, or pairs of bfloat16 that are multiplied and added at once.
//
// A format says how a unit (one number or one pair) comes from memory, and how many registers and how much cache products (products.cpp)
// and attention (attention.h) use.

#pragma once

#include "numbers.h"
#include "vectors.h"

namespace {

// float32 on any processor.
struct Singles {
  typedef float element;
  typedef float unit;
  typedef floats vector;
  static constexpr int PER = 1;  // numbers in a unit

  // A register tile: 6 by 2 vectors of sums and 3 operands fill 16 registers, 8 by 3 fit 32.
  static constexpr int TILE = REGISTERS == 32 ? 8 : 6, VECTORS = REGISTERS == 32 ? 3 : 2;
  static constexpr int64_t DEPTH = 384, OUTER_DEPTH = 384;  // numbers summed before sums are put aside: a panel fits the first cache
  static constexpr int64_t BLOCK = 8, STRIP = 8;            // tiles of rows that one panel is multiplied with before the next
  static constexpr int64_t PACKED_BYTES = 500'000;          // of panels for one thread; measured: 250,000 and 500,000 are equally fast
  static constexpr int64_t OUTER_BYTES = 2'000'000;         // the same for outer products, whose tiles are packed anew for each such group
  static constexpr int64_t SLAB = 0;                        // sums are put aside where the result will be
  static constexpr int VECTORS_AT_ONCE = REGISTERS == 32 ? 4 : 2;  // of attention's tiles of 6 rows
  static constexpr int64_t KEYS = 64, SEGMENT = 256;               // attention's blocks

  static vector load(const unit *from) { return ::load(from); }
  static void store(unit *to, vector x) { ::store(to, x); }
  static vector spread(unit x) { return all(x); }
  static floats add(floats sums, vector x, vector y) { return sums + x * y; }
  // Units of a row.
  static vector units(const element *row, Some some) { return ::load(row, some); }
  // Units of columns from `column` on, each from PER rows of which `there` exist.
  static vector below(const element *const *rows, int64_t, int64_t column, Some some) { return ::load(rows[0] + column, some); }
  // Rows of sums as units, and each row as it is; rows lie `apart` numbers from each other.
  static void put_below(unit *to, const floats (&rows)[1]) { ::store(to, rows[0]); }
  static void put_both(unit *to, element *lines, int64_t, const floats (&rows)[1]) { ::store(to, rows[0]), ::store(lines, rows[0]); }
  static void put(element *to, floats x) { ::store(to, x); }
  static void put(element *to, Some some, floats x) { ::store(to, some, x); }
  static floats power(floats x) { return ::power(x); }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS
// bfloat16 where the processor multiplies pairs of it.
struct Pairs {
  typedef bf16 element;
  typedef uint32_t unit;
  typedef ints vector;
  static constexpr int PER = 2;

  static constexpr int TILE = 8, VECTORS = 3;
  static constexpr int64_t DEPTH = 1536, OUTER_DEPTH = 768;  // 8 rows fit the first cache
  static constexpr int64_t BLOCK = 1, STRIP = 4;
  static constexpr int64_t PACKED_BYTES = 500'000, OUTER_BYTES = 1'000'000;  // half of a second cache of 1 MB
  static constexpr int64_t SLAB = 2048;             // rows whose sums may lie aside at once
  static constexpr int VECTORS_AT_ONCE = 4;
  static constexpr int64_t KEYS = 128, SEGMENT = 512;

  static vector load(const unit *from) { return (vector)_mm512_loadu_si512(from); }
  static void store(unit *to, vector x) { _mm512_storeu_si512(to, (__m512i)x); }
  static vector spread(unit x) { return all(int32_t(x)); }
  static floats add(floats sums, vector x, vector y) { return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)y); }
  static vector units(const element *row, Some some) { return (vector)_mm512_maskz_loadu_epi32(some, row); }
  static vector below(const element *const *rows, int64_t there, int64_t column, Some some) {
    __m512i x = wide(rows[0] + column, some), y = there > 1 ? wide(rows[1] + column, some) : _mm512_setzero_si512();
    return (vector)_mm512_or_si512(x, _mm512_slli_epi32(y, 16));
  }
  // Each number of a row beside the one below it.
  static void put_below(unit *to, const floats (&rows)[2]) { below_of(to, _mm512_cvtne2ps_pbh(rows[1], rows[0])); }
  static void put_both(unit *to, element *lines, int64_t apart, const floats (&rows)[2]) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
    below_of(to, (__m512bh)both);
    _mm256_storeu_si256((__m256i *)lines, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(lines + apart), _mm512_extracti64x4_epi64(both, 1));
  }
  static void put(element *to, floats x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }
  static void put(element *to, Some some, floats x) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh(x);
    if (some == 0xffff) return _mm256_storeu_si256((__m256i *)to, low);
    _mm256_mask_storeu_epi16(to, some, low);
  }
  // 2^x; relative error 3e-6, a thousandth of what the following rounding to bfloat16 costs.
  static floats power(floats x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(1.353416672e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146291e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414427555e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930038347e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000002593f));
    return _mm512_scalef_ps(p, x);
  }

 private:
  static void below_of(unit *to, __m512bh rows) {
    const __m512i order = (__m512i)(numbers() * 0x00010001 + 0x00100000);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)rows));
  }
  static __m512i wide(const element *from, Some some) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)); }
};
#endif

template <class F>
using Element = typename F::element;
template <class F>
using Unit = typename F::unit;

}  // namespace
