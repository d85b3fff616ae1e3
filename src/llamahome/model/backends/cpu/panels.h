// Packing of the operands of products.cpp into panels and tiles, and the register tile that multiplies them.

#pragma once

#include <algorithm>

#include "formats.h"

namespace {

constexpr int64_t PREFETCH_ROWS = 16;  // prefetch distance: the hardware prefetcher is late for short pieces of distant rows

template <class F>
constexpr int PANEL = LANES * F::TILE_VECTORS;

// Pack a panel whose columns are `count` rows of the matrix, of each the numbers [from, from + size).
template <class F>
void pack_rows(const Element<F> *const *rows, int64_t count, int64_t from, int64_t size, Unit<F> *to) {
  for (int v = 0; v < F::TILE_VECTORS; v++)
    for (int64_t p = 0; p < size / F::PER_UNIT; p += LANES) {
      Mask mask = first_lanes(size / F::PER_UNIT - p);
      typename F::vector block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        bool exists = LANES * v + i < count;
        block[i] = F::load_units(rows[exists ? LANES * v + i : 0] + from + F::PER_UNIT * p, exists ? mask : first_lanes(0));
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, size / F::PER_UNIT - p); i++)
        F::store(to + (p + i) * PANEL<F> + LANES * v, block[i]);
    }
}

// Pack panels whose columns are columns of the matrix: `count` columns from `column` on, of `size` rows; an odd last row is paired with
// zeros. Panels are `stride` units apart. The outer loop goes over rows, because sequential memory is read faster.
template <class F>
void pack_columns(const Element<F> *const *rows, int64_t size, int64_t column, int64_t count, Unit<F> *to, int64_t stride) {
  constexpr int64_t LINE = 64 / sizeof(typename F::element);
  for (int64_t p = 0; p * F::PER_UNIT < size; p++) {
    int64_t row = p * F::PER_UNIT;
    for (int64_t ahead = row + PREFETCH_ROWS; ahead < std::min(row + PREFETCH_ROWS + F::PER_UNIT, size); ahead++)
      for (int64_t i = 0; i < count + LINE - 1; i += LINE) __builtin_prefetch(rows[ahead] + column + std::min(i, count - 1));
    for (int64_t q = 0; q * PANEL<F> < count; q++)
      for (int v = 0; v < F::TILE_VECTORS; v++) {
        int64_t at = q * PANEL<F> + LANES * v;
        F::store(to + q * stride + p * PANEL<F> + LANES * v,
                 F::load_interleaved(rows + row, size - row, column + at, first_lanes(count - at)));
      }
  }
}

// Pack `count` columns of a transposed left operand as tiles of TILE_ROWS rows: unit p of a row goes to to[p * TILE_ROWS + row]. Tiles are
// `stride` units apart.
template <class F>
void pack_tiles(const Element<F> *const *rows, int64_t size, int64_t column, int64_t count, Unit<F> *to, int64_t stride) {
  constexpr int64_t STRIP = 4 * F::TILE_ROWS;
  static_assert(STRIP % LANES == 0);
  for (int64_t p = 0; p * F::PER_UNIT < size; p++)
    for (int64_t n = 0; n < count; n += STRIP) {
      Unit<F> tiles[STRIP];
#pragma GCC unroll 8
      for (int i = 0; i < STRIP; i += LANES)
        F::store(tiles + i,
                 F::load_interleaved(rows + p * F::PER_UNIT, size - p * F::PER_UNIT, column + n + i, first_lanes(count - n - i)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        memcpy(to + (n / F::TILE_ROWS + i) * stride + p * F::TILE_ROWS, tiles + i * F::TILE_ROWS, F::TILE_ROWS * sizeof *tiles);
    }
}

// A left operand, whose unit p of a row is left[row * row_stride + p * unit_stride], and the panel that it is multiplied with.
template <class F>
struct Term {
  const Unit<F> *left;
  int64_t row_stride;
  const Unit<F> *panel;
  int64_t units;
};

inline void store_sums(float *to, Mask mask, FloatVec x) { store(to, mask, x); }
#ifdef HAS_BF16_PAIRS
inline void store_sums(bf16 *to, Mask mask, FloatVec x) { Bf16Pairs::store_elements(to, mask, x); }
#endif

// to = start + the sum of both terms, for TILE_ROWS rows and `vectors` vectors of columns, of which `rows` and `columns` exist; start may
// be null. The earlier sums are added last: measured over 49,152 numbers, chunks of 384 have a quarter of the error of one running sum.
template <class F, int unit_stride, int vectors, class To>
void multiply_tile(const Term<F> (&terms)[2], const float *start, int64_t start_stride, To *to, int64_t to_stride, int64_t rows,
                   int64_t columns) {
  FloatVec sums[F::TILE_ROWS][vectors];
  Mask mask[vectors];
  for (int v = 0; v < vectors; v++) mask[v] = first_lanes(columns - LANES * v);
#pragma GCC unroll 8
  for (int r = 0; r < F::TILE_ROWS; r++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) sums[r][v] = FloatVec{};
  for (const Term<F> &term : terms)
    for (int64_t p = 0; p < term.units; p++) {
      typename F::vector y[vectors];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) y[v] = F::load(term.panel + p * PANEL<F> + LANES * v);
#pragma GCC unroll 8
      for (int r = 0; r < F::TILE_ROWS; r++) {
        typename F::vector x = F::broadcast(term.left[r * term.row_stride + p * unit_stride]);
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sums[r][v] = F::multiply_add(sums[r][v], x, y[v]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < F::TILE_ROWS; r++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++)
      if (r < rows) {
        if (start) sums[r][v] += load(start + r * start_stride + LANES * v, mask[v]);
        store_sums(to + r * to_stride + LANES * v, mask[v], sums[r][v]);
      }
}

template <class F, int unit_stride, class To>
void multiply_any_tile(const Term<F> (&terms)[2], const float *start, int64_t start_stride, To *to, int64_t to_stride, int64_t rows,
                       int64_t columns) {
  if (F::TILE_VECTORS > 2 && columns > 2 * LANES)
    multiply_tile<F, unit_stride, F::TILE_VECTORS>(terms, start, start_stride, to, to_stride, rows, columns);
  else if (columns > LANES)
    multiply_tile<F, unit_stride, 2>(terms, start, start_stride, to, to_stride, rows, columns);
  else
    multiply_tile<F, unit_stride, 1>(terms, start, start_stride, to, to_stride, rows, columns);
}

}  // namespace
