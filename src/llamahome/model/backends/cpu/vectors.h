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
inline Some first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
inline floats load(const float *from, Some some) { return _mm512_maskz_loadu_ps(some, from); }
inline void store(float *to, Some some, floats x) {
  if (some == 0xffff) return store(to, x);  // measured: masks cost 5 % of a head's product, whose every page is new
  _mm512_mask_storeu_ps(to, some, x);
}
#else
enum class Some : int64_t {};
inline Some first(int64_t count) { return Some(count); }
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

}  // namespace
