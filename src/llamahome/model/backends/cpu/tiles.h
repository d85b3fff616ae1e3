// Register tiles of products, and the orders in which they read their operands. Included by attention.h.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "formats.h"

namespace {

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t parts(int64_t x, int64_t most) { return (x + most - 1) / most; }

// The rows of one head of one document; position -> token -> memory.
template <class F>
struct Rows {
  const Element<F> *base;
  int64_t step, start, shared;
  const Element<F> *at(int64_t position) const { return base + (position < shared ? position : start + position - shared) * step; }
};

template <class X>
struct Room {  // aligned memory of one thread
  X *at;
  explicit Room(int64_t count) : at((X *)aligned_alloc(64, up(std::max<int64_t>(count, 1) * sizeof(X), 64))) {}
  Room(const Room &) = delete;
  ~Room() { free(at); }
};

template <class F>
void copy_row(const Element<F> *row, int64_t size, Unit<F> *to) {
  memcpy(to, row, size * sizeof(Element<F>));
}

// to[R][N vectors] (+)= a * b over `units` steps; steps of a and b in units: between rows, to the next unit, between vectors.
template <class F, int R, int N, bool add>
void product(const Unit<F> *a, int64_t a_row, int64_t a_next, const Unit<F> *b, int64_t b_next, int64_t b_vector, int64_t units,
             float *to, int64_t to_row) {
  floats sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[r][n] = add ? load(to + r * to_row + n * LANES) : floats{};
  for (int64_t p = 0; p < units; p++) {
    typename F::vector wide[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) wide[n] = F::load(b + n * b_vector);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      typename F::vector one = F::spread(a[r * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[r][n] = F::add(sum[r][n], one, wide[n]);
    }
    a += a_next;
    b += b_next;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(to + r * to_row + n * LANES, sum[r][n]);
}

// The same for any number of vectors, VECTORS_AT_ONCE of them at most.
template <class F, int R, bool add>
void products(const Unit<F> *a, int64_t a_row, int64_t a_next, const Unit<F> *b, int64_t b_next, int64_t b_vector, int64_t units,
              float *to, int64_t to_row, int64_t vectors) {
  constexpr int MOST = F::VECTORS_AT_ONCE;
  for (int64_t left = parts(vectors, MOST); left > 0; left--) {
    int64_t n = parts(vectors, left);
    auto one = n == MOST       ? product<F, R, MOST, add>
               : n == MOST - 1 ? product<F, R, MOST - 1, add>
               : n == 2        ? product<F, R, 2, add>
                               : product<F, R, 1, add>;
    one(a, a_row, a_next, b, b_next, b_vector, units, to, to_row);
    b += n * b_vector, to += n * LANES, vectors -= n;
  }
}

// [keys / LANES][size / PER][LANES keys] units of a row; rows from `stop` on are zero.
template <class F>
void pack_rows(const Rows<F> &rows, int64_t first, int64_t keys, int64_t stop, int64_t size, Unit<F> *to) {
  int64_t units = size / F::PER;
  for (int64_t chunk = 0; chunk < keys; chunk += LANES, to += units * LANES)
    for (int64_t at = 0; at < units; at += LANES) {
      typename F::vector block[LANES];
      Some some = some_of(units - at);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        int64_t position = first + chunk + i;
        bool there = position < stop;
        block[i] = F::units(rows.at(there ? position : first) + at * F::PER, there ? some : some_of(0));
      }
      turn(block);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, units - at); i++) F::store(to + (at + i) * LANES, block[i]);
    }
}

// [keys / PER][size] units of neighbouring rows; rows from `stop` on are zero.
template <class F>
void pack_below(const Rows<F> &rows, int64_t first, int64_t keys, int64_t stop, int64_t size, Unit<F> *to) {
  for (int64_t key = first; key < first + keys; key += F::PER, to += size) {
    const Element<F> *each[F::PER];
    for (int i = 0; i < F::PER; i++) each[i] = rows.at(key + i < stop ? key + i : first);
    Some some = some_of(key < stop ? LANES : 0);
    for (int64_t i = 0; i < size; i += LANES) F::store(to + i, F::below(each, stop - key, i, some));
  }
}

}  // namespace
