// Numbers of the compiled passes: bfloat16 as it lies in memory, and e^x as arithmetic. Included by the C++ sources beside it.

#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};

static inline float get(float x) { return x; }
static inline float get(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &wide, 4);
  return result;
}
static inline void put(float *place, float x) { *place = x; }
static inline void put(bf16 *place, float x) {  // to the nearest, ties to even, as torch does
  uint32_t wide;
  memcpy(&wide, &x, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  place->bits = x != x ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// e^x as 2^n * e^f with |f| <= ln(2)/2; relative error below 2e-7, and 0 below e^-88. Plain arithmetic, so that the compiler makes vectors of it.
static inline float exponential(float x) {
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
  n = n > -127.0f ? n : -127.0f;  // a NaN is in p
  int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return p * scale;
}
