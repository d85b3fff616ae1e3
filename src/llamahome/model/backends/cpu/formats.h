// Operand formats of the matrix kernels: single float32 numbers, or pairs of bfloat16 that one instruction multiplies and adds.
//
// A format defines how a unit (one float32 or one pair of bfloat16) is loaded and stored, and the register and cache blocking of the
// products (products.cpp) and of attention (attention.h).

#pragma once

#include "simd.h"

namespace {

inline int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// float32, on any processor.
struct Float32 {
  typedef float element;
  typedef float unit;
  typedef FloatVec vector;
  static constexpr int PER_UNIT = 1;  // numbers in a unit

  // A register tile: 6 by 2 vectors of sums and 3 operands fill 16 registers; 8 by 3 fit 32.
  static constexpr int TILE_ROWS = REGISTERS == 32 ? 8 : 6, TILE_VECTORS = REGISTERS == 32 ? 3 : 2;
  static constexpr int64_t DEPTH = 384, OUTER_DEPTH = 384;    // numbers that are summed in registers; a panel of them fits the L1 cache
  static constexpr int64_t BLOCK_TILES = 8, STRIP_TILES = 8;  // tiles of rows that are multiplied with one panel before the next panel
  static constexpr int64_t PACKED_BYTES = 500'000;            // panels of one thread; measured: 250,000 and 500,000 are equally fast
  static constexpr int64_t OUTER_PACKED_BYTES = 2'000'000;    // the same for outer products, which pack the tiles again for each group
  static constexpr int64_t SLAB_ROWS = 0;                     // unused: partial sums are kept in the output
  static constexpr int ATTENTION_VECTORS = REGISTERS == 32 ? 4 : 2;  // vectors of attention's register tile of 6 rows
  static constexpr int64_t KEY_BLOCK = 64, SEGMENT_KEYS = 256;       // keys of attention's forward blocks and backward segments

  static vector load(const unit *from) { return ::load(from); }
  static void store(unit *to, vector x) { ::store(to, x); }
  static vector broadcast(unit x) { return ::broadcast(x); }
  static FloatVec multiply_add(FloatVec sums, vector x, vector y) { return sums + x * y; }
  // Consecutive units of one row.
  static vector load_units(const element *row, Mask mask) { return ::load(row, mask); }
  // Units of PER_UNIT neighbouring rows, of which `count` exist, for the columns from `column` on.
  static vector load_interleaved(const element *const *rows, int64_t, int64_t column, Mask mask) { return ::load(rows[0] + column, mask); }
  // Store PER_UNIT rows of sums as units; the second function also stores each row by itself, `row_stride` numbers apart.
  static void store_interleaved(unit *to, const FloatVec (&rows)[1]) { ::store(to, rows[0]); }
  static void store_interleaved_and_rows(unit *to, element *by_row, int64_t, const FloatVec (&rows)[1]) {
    ::store(to, rows[0]), ::store(by_row, rows[0]);
  }
  static void store_elements(element *to, FloatVec x) { ::store(to, x); }
  static void store_elements(element *to, Mask mask, FloatVec x) { ::store(to, mask, x); }
  static FloatVec exp2_approx(FloatVec x) { return ::exp2_approx(x); }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_BF16_PAIRS
// bfloat16, where the processor has AVX512_BF16, which multiplies pairs.
struct Bf16Pairs {
  typedef bf16 element;
  typedef uint32_t unit;
  typedef IntVec vector;
  static constexpr int PER_UNIT = 2;

  static constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
  static constexpr int64_t DEPTH = 1536, OUTER_DEPTH = 768;  // 8 rows fit the L1 cache
  static constexpr int64_t BLOCK_TILES = 1, STRIP_TILES = 4;
  static constexpr int64_t PACKED_BYTES = 500'000, OUTER_PACKED_BYTES = 1'000'000;  // half of an L2 cache of 1 MB
  static constexpr int64_t SLAB_ROWS = 2048;  // rows whose partial sums are kept at a time, in float32 beside the output
  static constexpr int ATTENTION_VECTORS = 4;
  static constexpr int64_t KEY_BLOCK = 128, SEGMENT_KEYS = 512;

  static vector load(const unit *from) { return (vector)_mm512_loadu_si512(from); }
  static void store(unit *to, vector x) { _mm512_storeu_si512(to, (__m512i)x); }
  static vector broadcast(unit x) { return ::broadcast(int32_t(x)); }
  static FloatVec multiply_add(FloatVec sums, vector x, vector y) { return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)y); }
  static vector load_units(const element *row, Mask mask) { return (vector)_mm512_maskz_loadu_epi32(mask, row); }
  static vector load_interleaved(const element *const *rows, int64_t count, int64_t column, Mask mask) {
    __m512i x = widen(rows[0] + column, mask), y = count > 1 ? widen(rows[1] + column, mask) : _mm512_setzero_si512();
    return (vector)_mm512_or_si512(x, _mm512_slli_epi32(y, 16));
  }
  static void store_interleaved(unit *to, const FloatVec (&rows)[2]) { interleave(to, _mm512_cvtne2ps_pbh(rows[1], rows[0])); }
  static void store_interleaved_and_rows(unit *to, element *by_row, int64_t row_stride, const FloatVec (&rows)[2]) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
    interleave(to, (__m512bh)both);
    _mm256_storeu_si256((__m256i *)by_row, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(by_row + row_stride), _mm512_extracti64x4_epi64(both, 1));
  }
  static void store_elements(element *to, FloatVec x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }
  static void store_elements(element *to, Mask mask, FloatVec x) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh(x);
    if (mask == 0xffff) return _mm256_storeu_si256((__m256i *)to, low);
    _mm256_mask_storeu_epi16(to, mask, low);
  }
  // 2^x; relative error 3e-6, a thousandth of the error of rounding the result to bfloat16.
  static FloatVec exp2_approx(FloatVec x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(1.353416672e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146291e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414427555e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930038347e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000002593f));
    return _mm512_scalef_ps(p, x);
  }

 private:
  // Store two rows, one in each half of `rows`, so that numbers of the same column become neighbours.
  static void interleave(unit *to, __m512bh rows) {
    const __m512i order = (__m512i)(lane_indices() * 0x00010001 + 0x00100000);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)rows));
  }
  static __m512i widen(const element *from, Mask mask) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)); }
};
#endif

template <class F>
using Element = typename F::element;
template <class F>
using Unit = typename F::unit;

}  // namespace
