// Widens frozen weights of 4 or 8 bits. native.py compiles it on the user's machine; packed_weight.py holds the same in PyTorch.

#include "simd.h"

constexpr int64_t CHUNK = 32;  // numbers that are looked up before they are scaled, so that scaling is vectorized

// out[i] = value of code i * scales[i / block]. A byte holds two codes; pairs[byte] are their values. `block` is a multiple of CHUNK.
template <class X>
static void widen_codes(const uint8_t *codes, const float (*pairs)[2], const float *scales, X *out, int64_t numbers, int64_t block,
                        int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < numbers / CHUNK; chunk++) {
    float values[CHUNK];
    for (int64_t i = 0; i < CHUNK / 2; i++) memcpy(values + 2 * i, pairs[codes[chunk * CHUNK / 2 + i]], 8);
    float scale = scales[chunk * CHUNK / block];
#pragma omp simd
    for (int64_t i = 0; i < CHUNK; i++) assign(out + chunk * CHUNK + i, values[i] * scale);
  }
}

// out[row, i] = numbers[row, i] * scales[row]
template <class X>
static void widen_bytes(const int8_t *numbers, const float *scales, X *out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++)
#pragma omp simd
    for (int64_t i = 0; i < size; i++) assign(out + row * size + i, float(numbers[row * size + i]) * scales[row]);
}

#define FOR_TYPE(name, X)                                                                                                          \
  extern "C" void widen_codes_##name(const uint8_t *codes, const float (*pairs)[2], const float *scales, X *out, int64_t numbers,  \
                                     int64_t block, int threads) {                                                                 \
    widen_codes(codes, pairs, scales, out, numbers, block, threads);                                                               \
  }                                                                                                                                \
  extern "C" void widen_bytes_##name(const int8_t *numbers, const float *scales, X *out, int64_t rows, int64_t size, int threads) { \
    widen_bytes(numbers, scales, out, rows, size, threads);                                                                        \
  }
FOR_TYPE(f, float)
FOR_TYPE(b, bf16)
