// The two orders in which products of bfloat16 pairs read an operand (AVX512_BF16). Included by tiles.h and products.cpp.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

typedef uint32_t pair;  // two bfloat16 that are multiplied and added at once

// 16 rows of 16 pairs become 16 columns.
inline void turn(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // a[i + 4 j] holds, in quarter c, rows 4 j .. 4 j + 3 of column 4 c + i
    __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    __m512i low2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    b[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    b[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    b[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = b[i];
}

// 16 numbers of two rows, each beside the one below it; only those of the masks are read.
inline __m512i braid(const void *above, __mmask16 some, const void *below, __mmask16 others) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, above)), y = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(others, below));
  return _mm512_or_si512(x, _mm512_slli_epi32(y, 16));
}

}  // namespace
