// Number types of the kernels: bfloat16 scalars, and vectors of float32 as wide as the processor's registers (16 lanes with AVX-512, 8 with
// AVX, otherwise 4: NEON, SSE).
//
// Vectors are GCC's vector types, so the same source serves every processor. Intrinsics are used only where the compiler finds no good
// instruction.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &wide, 4);
  return result;
}
static inline void assign(float *to, float x) { *to = x; }
static inline void assign(bf16 *to, float x) {  // round to nearest, ties to even, as torch does
  uint32_t wide;
  memcpy(&wide, &x, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// e^x as 2^n * e^f with |f| <= ln(2)/2; relative error below 2e-7, and 0 below e^-88. Scalar arithmetic that the compiler vectorizes.
static inline float exp_approx(float x) {
  x = x > 88.0f ? 88.0f : x;
  float n = __builtin_rintf(x * 1.44269504f);
  float f = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts (Cephes)
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  n = n > -127.0f ? n : -127.0f;  // a NaN survives in p
  int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return p * scale;
}

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

typedef float FloatVec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), may_alias));
typedef float UnalignedFloatVec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

inline FloatVec load(const float *from) { return *(const UnalignedFloatVec *)from; }
inline void store(float *to, FloatVec x) { *(UnalignedFloatVec *)to = x; }
inline FloatVec broadcast(float x) { return x - FloatVec{}; }
inline IntVec broadcast(int32_t x) { return x - IntVec{}; }

// Selects the first lanes of a vector: a bit mask with AVX-512, otherwise a count. Masked loads set the other lanes to zero; masked stores
// leave the memory behind them alone.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
inline Mask first_lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
inline FloatVec load(const float *from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline void store(float *to, Mask mask, FloatVec x) {
  if (mask == 0xffff) return store(to, x);  // measured: masked stores cost 5 % of a loss head's product, which writes to new pages
  _mm512_mask_storeu_ps(to, mask, x);
}
#else
enum class Mask : int64_t {};
inline Mask first_lanes(int64_t count) { return Mask(count); }
inline FloatVec load(const float *from, Mask mask) {
  if (int64_t(mask) >= LANES) return load(from);
  float lanes[LANES] = {};
  for (int64_t i = 0; i < int64_t(mask); i++) lanes[i] = from[i];
  return load(lanes);
}
inline void store(float *to, Mask mask, FloatVec x) {
  if (int64_t(mask) >= LANES) return store(to, x);
  float lanes[LANES];
  store(lanes, x);
  for (int64_t i = 0; i < int64_t(mask); i++) to[i] = lanes[i];
}
#endif

// Lanes I... of the 2 * LANES lanes of a and b.
template <class V, size_t... I>
inline V shuffle(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IntVec{int32_t(I)...});
#endif
}

template <int D, class V, size_t... I>
inline void swap_blocks(V &a, V &b, std::index_sequence<I...>) {
  V low = shuffle(a, b, std::index_sequence<(I & D ? LANES + I - D : I)...>());
  b = shuffle(a, b, std::index_sequence<(I & D ? LANES + I : I + D)...>());
  a = low;
}

// Transpose a LANES by LANES matrix in registers: swap blocks of D by D, with D from LANES / 2 down to 1.
template <int D = LANES / 2, class V>
inline void transpose(V (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & D)) swap_blocks<D>(rows[i], rows[i + D], std::make_index_sequence<LANES>());
  if constexpr (D > 1) transpose<D / 2>(rows);
}

// Reduce all lanes to one number by combining halves.
template <int D = LANES / 2, class Combine, size_t... I>
inline float reduce(FloatVec x, Combine combine, std::index_sequence<I...> lanes) {
  x = combine(x, shuffle(x, x, std::index_sequence<(I + D) % LANES...>()));
  if constexpr (D > 1) return reduce<D / 2>(x, combine, lanes);
  return x[0];
}
inline FloatVec maximum(FloatVec a, FloatVec b) { return a > b ? a : b; }
inline float reduce_max(FloatVec x) { return reduce(x, maximum, std::make_index_sequence<LANES>()); }
inline float reduce_sum(FloatVec x) {
  return reduce(x, [](FloatVec a, FloatVec b) { return a + b; }, std::make_index_sequence<LANES>());
}

template <size_t... I>
inline IntVec index_vector(std::index_sequence<I...>) {
  return IntVec{int32_t(I)...};
}
// 0, 1, 2, ...
inline IntVec lane_indices() { return index_vector(std::make_index_sequence<LANES>()); }

// 2^x for x below 127; relative error 2e-7, and 0 below 2^-125. The polynomial is from Cephes. A NaN stays a NaN.
inline FloatVec exp2_approx(FloatVec x) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits of the sum then hold
  FloatVec shifted = x + ROUND, f = x - (shifted - ROUND);
  FloatVec p = broadcast(1.535336188e-4f);
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1;
  FloatVec result = (FloatVec)((IntVec)p + ((IntVec)shifted << 23));
  return x < -125.0f ? FloatVec{} : x == x ? result : x;
}

}  // namespace
