// What the operands of a product are made of: single float32 numbers, or pairs of bfloat16 that are multiplied and added at once.
//
// A format says how a unit (one number or one pair) comes from memory, and how many registers and how much cache a product uses.

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
  static constexpr int64_t DEPTH = 384, OUTER_DEPTH = 384;
  static constexpr int64_t BLOCK = 8, STRIP = 8;
  static constexpr int64_t PACKED_BYTES = 500'000;
  static constexpr int64_t SLAB = INT64_MAX / 64;

  static vector load(const unit *from) { return ::load(from); }
  static void store(unit *to, vector x) { ::store(to, x); }
  static vector spread(unit x) { return all(x); }
  static floats add(floats sums, vector x, vector y) { return sums + x * y; }
  // Units of a row.
  static vector units(const element *row, Some some) { return ::load(row, some); }
  // Units of columns from `column` on, each from PER rows of which `there` exist.
  static vector below(const element *const *rows, int64_t, int64_t column, Some some) { return ::load(rows[0] + column, some); }
  static void put(element *to, Some some, floats x) { ::store(to, some, x); }
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
  static constexpr int64_t PACKED_BYTES = 500'000;  // half of a second cache of 1 MB
  static constexpr int64_t SLAB = 2048;

  static vector load(const unit *from) { return (vector)_mm512_loadu_si512(from); }
  static void store(unit *to, vector x) { _mm512_storeu_si512(to, (__m512i)x); }
  static vector spread(unit x) { return all(int32_t(x)); }
  static floats add(floats sums, vector x, vector y) { return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)y); }
  static vector units(const element *row, Some some) { return (vector)_mm512_maskz_loadu_epi32(some, row); }
  static vector below(const element *const *rows, int64_t there, int64_t column, Some some) {
    __m512i x = wide(rows[0] + column, some), y = there > 1 ? wide(rows[1] + column, some) : _mm512_setzero_si512();
    return (vector)_mm512_or_si512(x, _mm512_slli_epi32(y, 16));
  }
  static void put(element *to, Some some, floats x) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh(x);
    if (some == 0xffff) return _mm256_storeu_si256((__m256i *)to, low);
    _mm256_mask_storeu_epi16(to, some, low);
  }

 private:
  static __m512i wide(const element *from, Some some) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)); }
};
#endif

}  // namespace
