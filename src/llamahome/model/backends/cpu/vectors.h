// Vectors of float32, as wide as the processor's registers: 16 numbers with AVX-512, 8 with AVX, otherwise 4 (NEON, SSE).
//
// They are GCC's vector types, so one source serves every processor; intrinsics stand only where the compiler finds no good instruction.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));
typedef float floats_anywhere __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

inline floats load(const float *from) { return *(const floats_anywhere *)from; }
inline void store(float *to, floats x) { *(floats_anywhere *)to = x; }
inline floats all(float x) { return x - floats{}; }
inline ints all(int32_t x) { return x - ints{}; }

// The first numbers of a vector: how many, or the mask that says it. Loads fill up with zeros; nothing else is read or written.
#if defined(__AVX512F__)
typedef __mmask16 Some;
inline Some some_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
inline floats load(const float *from, Some some) { return _mm512_maskz_loadu_ps(some, from); }
inline void store(float *to, Some some, floats x) {
  if (some == 0xffff) return store(to, x);  // measured: masks cost 5 % of a head's product, whose every page is new
  _mm512_mask_storeu_ps(to, some, x);
}
#else
enum class Some : int64_t {};
inline Some some_of(int64_t count) { return Some(count); }
inline floats load(const float *from, Some some) {
  if (int64_t(some) >= LANES) return load(from);
  float each[LANES] = {};
  for (int64_t i = 0; i < int64_t(some); i++) each[i] = from[i];
  return load(each);
}
inline void store(float *to, Some some, floats x) {
  if (int64_t(some) >= LANES) return store(to, x);
  float each[LANES];
  store(each, x);
  for (int64_t i = 0; i < int64_t(some); i++) to[i] = each[i];
}
#endif

// Numbers of two vectors, counted through both.
template <class V, size_t... I>
inline V pick(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, ints{int32_t(I)...});
#endif
}

template <int D, class V, size_t... I>
inline void exchange(V &a, V &b, std::index_sequence<I...>) {
  V low = pick(a, b, std::index_sequence<(I & D ? LANES + I - D : I)...>());
  b = pick(a, b, std::index_sequence<(I & D ? LANES + I : I + D)...>());
  a = low;
}

// Rows become columns: blocks of D by D are exchanged, D from half of a vector down to one.
template <int D = LANES / 2, class V>
inline void turn(V (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_index_sequence<LANES>());
  if constexpr (D > 1) turn<D / 2>(rows);
}

// One number of all: halves are put together by `both` until one is left.
template <int D = LANES / 2, class Both, size_t... I>
inline float fold(floats x, Both both, std::index_sequence<I...> lanes) {
  x = both(x, pick(x, x, std::index_sequence<(I + D) % LANES...>()));
  if constexpr (D > 1) return fold<D / 2>(x, both, lanes);
  return x[0];
}
inline floats larger(floats a, floats b) { return a > b ? a : b; }
inline float largest(floats x) { return fold(x, larger, std::make_index_sequence<LANES>()); }
inline float sum(floats x) {
  return fold(x, [](floats a, floats b) { return a + b; }, std::make_index_sequence<LANES>());
}

template <size_t... I>
inline ints numbered(std::index_sequence<I...>) {
  return ints{int32_t(I)...};
}
// 0, 1, 2, ...
inline ints numbers() { return numbered(std::make_index_sequence<LANES>()); }

// 2^x for x below 127; relative error 2e-7, and 0 below 2^-125. The polynomial is Cephes'; a NaN stays one.
inline floats power(floats x) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: what is added to it is rounded to a whole number, which its last bits then hold
  floats shifted = x + ROUND, f = x - (shifted - ROUND);
  floats p = all(1.535336188e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1;
  floats result = (floats)((ints)p + ((ints)shifted << 23));
  return x < -125.0f ? floats{} : x == x ? result : x;
}

}  // namespace
