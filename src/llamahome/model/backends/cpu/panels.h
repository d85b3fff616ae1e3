// How products.cpp packs its operands into panels and tiles, and the tile of sums that stays in registers.

#pragma once

#include <algorithm>

#include "formats.h"

namespace {

constexpr int64_t AHEAD = 16;   // rows that are asked of memory before they are packed: pieces of rows that lie apart come unasked too late

template <class F>
constexpr int PANEL = LANES * F::VECTORS;

inline int64_t ceil(int64_t x, int64_t by) { return (x + by - 1) / by; }

// A panel whose columns are rows of the matrix: numbers [from, from + size) of `count` rows.
template <class F>
void pack_rows(const Element<F> *const *rows, int64_t count, int64_t from, int64_t size, Unit<F> *to) {
  for (int v = 0; v < F::VECTORS; v++)
    for (int64_t p = 0; p < size / F::PER; p += LANES) {
      Some some = some_of(size / F::PER - p);
      typename F::vector block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        bool there = LANES * v + i < count;
        block[i] = F::units(rows[there ? LANES * v + i : 0] + from + F::PER * p, there ? some : some_of(0));
      }
      turn(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, size / F::PER - p); i++) F::store(to + (p + i) * PANEL<F> + LANES * v, block[i]);
    }
}

// Panels whose columns are columns of the matrix: `count` of them from `column` on, `size` rows; an odd last row is paired with zeros.
// Row by row over all panels, which lie `apart` units from each other, for memory gives what follows itself faster.
template <class F>
void pack_columns(const Element<F> *const *rows, int64_t size, int64_t column, int64_t count, Unit<F> *to,
                  int64_t apart) {
  constexpr int64_t LINE = 64 / sizeof(typename F::element);
  for (int64_t p = 0; p * F::PER < size; p++) {
    int64_t row = p * F::PER;
    for (int64_t later = row + AHEAD; later < std::min(row + AHEAD + F::PER, size); later++)
      for (int64_t i = 0; i < count + LINE - 1; i += LINE) __builtin_prefetch(rows[later] + column + std::min(i, count - 1));
    for (int64_t q = 0; q * PANEL<F> < count; q++)
      for (int v = 0; v < F::VECTORS; v++) {
        int64_t at = q * PANEL<F> + LANES * v;
        F::store(to + q * apart + p * PANEL<F> + LANES * v, F::below(rows + row, size - row, column + at, some_of(count - at)));
      }
  }
}

// Rows of a turned left operand: `count` columns as tiles of F::TILE, each to[p * TILE + row]; tiles lie `apart` units from each other.
template <class F>
void pack_tiles(const Element<F> *const *rows, int64_t size, int64_t column, int64_t count, Unit<F> *to, int64_t apart) {
  constexpr int64_t STRIP = 4 * F::TILE;
  static_assert(STRIP % LANES == 0);
  for (int64_t p = 0; p * F::PER < size; p++)
    for (int64_t n = 0; n < count; n += STRIP) {
      Unit<F> four[STRIP];
#pragma GCC unroll 8
      for (int i = 0; i < STRIP; i += LANES)
        F::store(four + i, F::below(rows + p * F::PER, size - p * F::PER, column + n + i, some_of(count - n - i)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) memcpy(to + (n / F::TILE + i) * apart + p * F::TILE, four + i * F::TILE, F::TILE * sizeof *four);
    }
}

// A left operand, left[row * across + p * along] being unit p of a row, and the panel it is multiplied with.
template <class F>
struct Term {
  const Unit<F> *left;
  int64_t across;
  const Unit<F> *panel;
  int64_t units;
};

inline void put(float *to, Some some, floats x) { store(to, some, x); }
#ifdef HAS_PAIRS
inline void put(bf16 *to, Some some, floats x) { Pairs::put(to, some, x); }
#endif

// to = start + the sum of both terms, for TILE rows and some vectors of columns, of which `rows` and `columns` are real; start may be null.
// What was summed before is added last: the error of 49,152 numbers in chunks of 384 is a quarter of that of one running sum.
template <class F, int along, int vectors, class To>
void tile(const Term<F> (&terms)[2], const float *start, int64_t start_step, To *to, int64_t step, int64_t rows, int64_t columns) {
  floats sums[F::TILE][vectors];
  Some some[vectors];
  for (int v = 0; v < vectors; v++) some[v] = some_of(columns - LANES * v);
#pragma GCC unroll 8
  for (int r = 0; r < F::TILE; r++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++)
      sums[r][v] = floats{};
  for (const Term<F> &term : terms)
    for (int64_t p = 0; p < term.units; p++) {
      typename F::vector y[vectors];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) y[v] = F::load(term.panel + p * PANEL<F> + LANES * v);
#pragma GCC unroll 8
      for (int r = 0; r < F::TILE; r++) {
        typename F::vector x = F::spread(term.left[r * term.across + p * along]);
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sums[r][v] = F::add(sums[r][v], x, y[v]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < F::TILE; r++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++)
      if (r < rows) {
        if (start) sums[r][v] += load(start + r * start_step + LANES * v, some[v]);
        put(to + r * step + LANES * v, some[v], sums[r][v]);
      }
}

template <class F, int along, class To>
void any_tile(const Term<F> (&terms)[2], const float *start, int64_t start_step, To *to, int64_t step, int64_t rows, int64_t columns) {
  if (F::VECTORS > 2 && columns > 2 * LANES)
    tile<F, along, F::VECTORS>(terms, start, start_step, to, step, rows, columns);
  else if (columns > LANES)
    tile<F, along, 2>(terms, start, start_step, to, step, rows, columns);
  else
    tile<F, along, 1>(terms, start, start_step, to, step, rows, columns);
}

}  // namespace
