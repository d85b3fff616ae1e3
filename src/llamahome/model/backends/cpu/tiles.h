// The register tile of attention's products, and the packing of its operands.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "formats.h"

namespace {

// The rows of one head of one document, by position in the document. The first `shared` positions are shared by all documents.
template <class F>
struct HeadRows {
  const Element<F> *base;
  int64_t stride, start, shared;
  const Element<F> *at(int64_t position) const { return base + (position < shared ? position : start + position - shared) * stride; }
};

template <class X>
struct Scratch {  // aligned memory, owned by one thread
  X *data;
  explicit Scratch(int64_t count) : data((X *)aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(X), 64))) {}
  Scratch(const Scratch &) = delete;
  ~Scratch() { free(data); }
};

template <class F>
void copy_row(const Element<F> *row, int64_t size, Unit<F> *to) {
  memcpy(to, row, size * sizeof(Element<F>));
}

// to[R][N vectors] (+)= a * b, summed over `units` units. Strides of a and b are in units: between rows, between summed units, between
// vectors.
template <class F, int R, int N, bool add>
void multiply_tile(const Unit<F> *a, int64_t a_row_stride, int64_t a_unit_stride, const Unit<F> *b, int64_t b_unit_stride,
                   int64_t b_vector_stride, int64_t units, float *to, int64_t to_stride) {
  FloatVec sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[r][n] = add ? load(to + r * to_stride + n * LANES) : FloatVec{};
  for (int64_t p = 0; p < units; p++) {
    typename F::vector y[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) y[n] = F::load(b + n * b_vector_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      typename F::vector x = F::broadcast(a[r * a_row_stride]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sums[r][n] = F::multiply_add(sums[r][n], x, y[n]);
    }
    a += a_unit_stride;
    b += b_unit_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(to + r * to_stride + n * LANES, sums[r][n]);
}

// The same for any number of vectors, in tiles of at most ATTENTION_VECTORS.
template <class F, int R, bool add>
void multiply_rows(const Unit<F> *a, int64_t a_row_stride, int64_t a_unit_stride, const Unit<F> *b, int64_t b_unit_stride,
                   int64_t b_vector_stride, int64_t units, float *to, int64_t to_stride, int64_t vectors) {
  constexpr int MAX = F::ATTENTION_VECTORS;
  for (int64_t tiles = ceil_div(vectors, MAX); tiles > 0; tiles--) {
    int64_t n = ceil_div(vectors, tiles);
    auto tile = n == MAX       ? multiply_tile<F, R, MAX, add>
                : n == MAX - 1 ? multiply_tile<F, R, MAX - 1, add>
                : n == 2       ? multiply_tile<F, R, 2, add>
                               : multiply_tile<F, R, 1, add>;
    tile(a, a_row_stride, a_unit_stride, b, b_unit_stride, b_vector_stride, units, to, to_stride);
    b += n * b_vector_stride, to += n * LANES, vectors -= n;
  }
}

// Pack rows as [keys / LANES][size / PER_UNIT][LANES keys] units of one row each; rows from `stop` on are zero.
template <class F>
void pack_rows(const HeadRows<F> &rows, int64_t first, int64_t keys, int64_t stop, int64_t size, Unit<F> *to) {
  int64_t units = size / F::PER_UNIT;
  for (int64_t chunk = 0; chunk < keys; chunk += LANES, to += units * LANES)
    for (int64_t unit = 0; unit < units; unit += LANES) {
      typename F::vector block[LANES];
      Mask mask = first_lanes(units - unit);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        int64_t position = first + chunk + i;
        bool exists = position < stop;
        block[i] = F::load_units(rows.at(exists ? position : first) + unit * F::PER_UNIT, exists ? mask : first_lanes(0));
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, units - unit); i++) F::store(to + (unit + i) * LANES, block[i]);
    }
}

// Pack rows as [keys / PER_UNIT][size] units of neighbouring rows; rows from `stop` on are zero.
template <class F>
void pack_interleaved(const HeadRows<F> &rows, int64_t first, int64_t keys, int64_t stop, int64_t size, Unit<F> *to) {
  for (int64_t key = first; key < first + keys; key += F::PER_UNIT, to += size) {
    const Element<F> *neighbours[F::PER_UNIT];
    for (int i = 0; i < F::PER_UNIT; i++) neighbours[i] = rows.at(key + i < stop ? key + i : first);
    Mask mask = first_lanes(key < stop ? LANES : 0);
    for (int64_t i = 0; i < size; i += LANES) F::store(to + i, F::load_interleaved(neighbours, stop - key, i, mask));
  }
}

}  // namespace
