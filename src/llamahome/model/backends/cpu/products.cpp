// Products of matrices for the linear layers of a decoder, summed in float32; compiled on the user's machine by native.py.
//
// One operand is packed as it is needed: panels of VECTORS vectors of columns, unit by unit of the summed direction (formats.h: a number
// of float32, or a pair of bfloat16). Packing takes 1 to 3 % of the time of 500 rows and spares a turned or joined copy of the weights.
// Tiles of TILE rows of sums stay in registers. Every sum runs in one order, so results are the same bits whatever the number of threads.
// Measured beside torch's products: docs/log.md. bfloat16 without the instruction (AVX512_BF16) is not made and torch multiplies.

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <type_traits>
#include <vector>

#include "panels.h"

namespace {

constexpr int64_t PACKING = 8;  // what packing a panel costs, in tiles; only decides who does what

// Memory that a thread keeps from call to call.
struct Room {
  void *place = nullptr;
  size_t bytes = 0;
  template <class X>
  X *take(int64_t count) {
    size_t wanted = (count * sizeof(X) + 63) / 64 * 64;
    if (wanted > bytes) {
      free(place);
      place = aligned_alloc(64, wanted);
      bytes = wanted;
    }
    return static_cast<X *>(place);
  }
};
thread_local Room panel_room, sum_room, row_room, tail_room;

// Which of `rows` tiles and `panels` panels a thread does: a grid of threads that leaves the slowest the least to do.
struct Share {
  int64_t row, row_stop, panel, panel_stop;
};
Share share(int64_t rows, int64_t panels, int thread, int threads) {
  int64_t best = INT64_MAX, across = 1;
  for (int64_t c = 1; c <= threads; c++) {
    if (threads % c) continue;
    int64_t down = threads / c, cost = ceil(panels, c) * (ceil(rows, down) + PACKING);
    if (cost < best) best = cost, across = c;
  }
  int64_t down = threads / across, r = thread / across, c = thread % across;
  return {rows * r / down, rows * (r + 1) / down, panels * c / across, panels * (c + 1) / across};
}

int64_t chunks_of(int64_t size, int64_t most, int64_t *depth) {
  int64_t chunks = std::max<int64_t>(1, ceil(size, most));
  *depth = ceil(ceil(size, chunks), 32) * 32;
  return ceil(size, *depth);
}

// out [T, N] = x [T, S] * w + low [T, R] * factor [R, N] + bias [N]; see `multiply`.
template <class F>
struct Product {
  using element = Element<F>;
  using unit = Unit<F>;
  const element *x;
  int64_t x_step;
  std::vector<const element *> rows, factor_rows;
  int64_t size, columns;
  bool turned;
  const element *low;
  int64_t rank;
  const float *bias;
  element *out;
  int64_t tokens, depth, chunks, low_units, panel_units, group;

  // Panels [first, last) of one chunk of the summed direction, and below them the low-rank factor's.
  void pack(int64_t first, int64_t last, int64_t from, int64_t here, bool lowest, unit *packed) const {
    int64_t left = std::min(last * PANEL<F>, columns) - first * PANEL<F>;
    for (int64_t q = first; q < last && turned; q++)
      pack_rows<F>(&rows[q * PANEL<F>], left - (q - first) * PANEL<F>, from, here, packed + (q - first) * panel_units);
    if (!turned) pack_columns<F>(&rows[from], here, first * PANEL<F>, left, packed, panel_units);
    if (lowest && low) pack_columns<F>(factor_rows.data(), rank, first * PANEL<F>, left, packed + here / F::PER * PANEL<F>, panel_units);
  }

  // The last rows, repeated to a whole tile, so that nothing is read past them.
  void pack_tail(int64_t from, int64_t here, element *tail) const {
    for (int64_t r = 0, t = tokens / F::TILE * F::TILE; r < F::TILE; r++) {
      std::copy_n(x + std::min(t + r, tokens - 1) * x_step + from, here, tail + r * depth);
      if (low) std::copy_n(low + std::min(t + r, tokens - 1) * rank, rank, tail + F::TILE * depth + r * rank);
    }
  }

  // One chunk of a tile of rows and a panel; sums of all but the last chunk lie aside, float32 ones where the result will be.
  void sum(int64_t chunk, int64_t tile, int64_t q, const unit *panel, const element *tail, float *own, int64_t own_step) const {
    int64_t from = chunk * depth, here = std::min(depth, size - from), t = tile * F::TILE, height = std::min<int64_t>(F::TILE, tokens - t);
    bool last = chunk + 1 == chunks, cut = height < F::TILE;
    const element *left = cut ? tail : x + t * x_step + from, *lower = cut ? tail + F::TILE * depth : low + t * rank;
    const float *start = chunk ? own : bias ? bias + q * PANEL<F> : nullptr;
    int64_t width = std::min<int64_t>(PANEL<F>, columns - q * PANEL<F>), start_step = chunk ? own_step : 0;
    Term<F> terms[2] = {{(const unit *)left, (cut ? depth : x_step) / F::PER, panel, here / F::PER},
                        {(const unit *)lower, rank / F::PER, panel + here / F::PER * PANEL<F>, last ? low_units : 0}};
    if (last)
      any_tile<F, 1>(terms, start, start_step, out + t * columns + q * PANEL<F>, columns, height, width);
    else
      any_tile<F, 1>(terms, start, start_step, own, own_step, height, width);
  }

  void run(const Share &mine) const {
    constexpr bool ASIDE = !std::is_same<element, float>::value;
    int64_t slab = ASIDE ? F::SLAB / F::TILE : INT64_MAX / 2, own_step = ASIDE ? group * PANEL<F> : columns;
    unit *packed = panel_room.take<unit>(group * panel_units);
    float *aside = ASIDE && chunks > 1 ? sum_room.take<float>(F::SLAB * group * PANEL<F>) : nullptr;
    element *tail = tail_room.take<element>(F::TILE * (depth + rank));
    for (int64_t first = mine.panel, last; first < mine.panel_stop; first = last) {
      last = std::min(first + group, mine.panel_stop);
      for (int64_t row = mine.row, row_stop; row < mine.row_stop; row = row_stop) {
        row_stop = std::min(row + slab, mine.row_stop);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          int64_t from = chunk * depth, here = std::min(depth, size - from);
          if (chunks > 1 || row == mine.row) pack(first, last, from, here, chunk + 1 == chunks, packed);
          if (row_stop * F::TILE > tokens) pack_tail(from, here, tail);
          for (int64_t block = row; block < row_stop; block += F::BLOCK)
            for (int64_t q = first; q < last; q++)
              for (int64_t tile = block; tile < std::min(block + F::BLOCK, row_stop); tile++) {
                float *own = (float *)out + tile * F::TILE * columns + q * PANEL<F>;
                if (ASIDE) own = aside + (tile - row) * F::TILE * own_step + (q - first) * PANEL<F>;
                sum(chunk, tile, q, packed + (q - first) * panel_units, tail, own, own_step);
              }
        }
      }
    }
  }
};

// out = x * w + low * factor + bias, where w consists of `count` matrices below each other, each [heights[i], width], turned (S = width,
// N = all heights) or not (S = all heights, N = width). S and R are whole units; low and bias may be null.
template <class F>
void multiply(const Element<F> *x, int64_t x_step, const Element<F> *const *parts, const int64_t *heights, int64_t count, int64_t width,
              int turned, const Element<F> *low, const Element<F> *factor, int64_t rank, const float *bias, Element<F> *out, int64_t tokens,
              int threads) {
  std::vector<const Element<F> *> rows, factor_rows;
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < heights[i]; r++) rows.push_back(parts[i] + r * width);
  int64_t size = turned ? width : rows.size(), columns = turned ? rows.size() : width, depth;
  int64_t chunks = chunks_of(size, F::DEPTH, &depth), panels = ceil(columns, PANEL<F>), tiles = ceil(tokens, F::TILE);
  for (int64_t r = 0; low && r < rank; r++) factor_rows.push_back(factor + r * columns);
  int64_t low_units = low ? rank / F::PER : 0, panel_units = (depth / F::PER + low_units) * PANEL<F>;
  int64_t group = std::max<int64_t>(1, F::PACKED_BYTES / (panel_units * sizeof(Unit<F>)));
  Product<F> product = {x, x_step, std::move(rows), std::move(factor_rows), size, columns, turned != 0, low, rank,
                        bias, out, tokens, depth, chunks, low_units, panel_units, group};
#pragma omp parallel num_threads(threads)
  product.run(share(tiles, panels, omp_get_thread_num(), omp_get_num_threads()));
}

// low [T, R] = x * first turned, with first [R, S], and out = x * w + low * second [R, N] + bias.
template <class F>
void adapted(const Element<F> *x, int64_t x_step, const Element<F> *const *parts, const int64_t *heights, int64_t count, int64_t width,
             int turned, const Element<F> *first, const Element<F> *second, int64_t rank, const float *bias, Element<F> *low,
             Element<F> *out, int64_t tokens, int threads) {
  int64_t size = turned ? width : std::accumulate(heights, heights + count, int64_t(0));
  multiply<F>(x, x_step, &first, &rank, 1, size, 1, nullptr, nullptr, 0, nullptr, low, tokens, threads);
  multiply<F>(x, x_step, parts, heights, count, width, turned, low, second, rank, bias, out, tokens, threads);
}

// out [N, M] float32 = (add ? out : 0) + sum over tokens of left [T, N] by right [T, M]: gradients of weights.
template <class F>
void outer(const Element<F> *left, int64_t left_step, int64_t wide, const Element<F> *right, int64_t right_step, int64_t columns,
           float *out, int add, int64_t tokens, int threads) {
  constexpr int64_t STRIP = F::STRIP * F::TILE;
  int64_t depth, chunks = chunks_of(tokens, F::OUTER_DEPTH, &depth), units = depth / F::PER, panel_units = units * PANEL<F>;
  int64_t panels = ceil(columns, PANEL<F>), strips = ceil(wide, STRIP);
  int64_t group = std::max<int64_t>(1, F::OUTER_BYTES / (panel_units * sizeof(Unit<F>)));
#pragma omp parallel num_threads(threads)
  {
    Share mine = share(F::STRIP * strips, panels, omp_get_thread_num(), omp_get_num_threads());
    auto *packed = panel_room.take<Unit<F>>(group * panel_units), *tiles = row_room.take<Unit<F>>(units * STRIP);
    std::vector<const Element<F> *> left_rows(depth), right_rows(depth);
    for (int64_t first = mine.panel; first < mine.panel_stop; first += group)
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t from = chunk * depth, here = std::min(depth, tokens - from), last = std::min(first + group, mine.panel_stop);
        for (int64_t t = 0; t < here; t++) {
          left_rows[t] = left + (from + t) * left_step;
          right_rows[t] = right + (from + t) * right_step;
        }
        int64_t column = first * PANEL<F>;
        pack_columns<F>(right_rows.data(), here, column, std::min(last * PANEL<F>, columns) - column, packed, panel_units);
        for (int64_t n = mine.row * F::TILE, end = std::min(mine.row_stop * F::TILE, wide); n < end; n += STRIP) {
          int64_t stop = std::min(n + STRIP, end);
          pack_tiles<F>(left_rows.data(), here, n, std::min(STRIP, wide - n), tiles, units * F::TILE);
          for (int64_t block = n; block < stop; block += F::BLOCK * F::TILE)
            for (int64_t q = first; q < last; q++)
              for (int64_t i = block; i < std::min(block + F::BLOCK * F::TILE, stop); i += F::TILE) {
                float *to = out + i * columns + q * PANEL<F>;
                Term<F> terms[2] = {{tiles + (i - n) * units, 1, packed + (q - first) * panel_units, ceil(here, F::PER)}, {}};
                int64_t height = std::min<int64_t>(F::TILE, wide - i), width = std::min<int64_t>(PANEL<F>, columns - q * PANEL<F>);
                any_tile<F, F::TILE>(terms, chunk || add ? to : nullptr, columns, to, columns, height, width);
              }
        }
      }
  }
}

}  // namespace

#define PRODUCTS(F, X, letter)                                                                                                          \
  extern "C" void product_##letter(const X *x, int64_t x_step, const X *const *parts, const int64_t *heights, int64_t count,             \
                                   int64_t width, int turned, const float *bias, X *out, int64_t tokens, int threads) {                  \
    multiply<F>(x, x_step, parts, heights, count, width, turned, nullptr, nullptr, 0, bias, out, tokens, threads);                       \
  }                                                                                                                                      \
  extern "C" void adapted_product_##letter(const X *x, int64_t x_step, const X *const *parts, const int64_t *heights, int64_t count,     \
                                           int64_t width, int turned, const X *first, const X *second, int64_t rank,                     \
                                           const float *bias, X *low, X *out, int64_t tokens, int threads) {                             \
    adapted<F>(x, x_step, parts, heights, count, width, turned, first, second, rank, bias, low, out, tokens, threads);                   \
  }                                                                                                                                      \
  extern "C" void outer_product_##letter(const X *left, int64_t left_step, int64_t wide, const X *right, int64_t right_step,             \
                                         int64_t columns, float *out, int add, int64_t tokens, int threads) {                            \
    outer<F>(left, left_step, wide, right, right_step, columns, out, add, tokens, threads);                                              \
  }

PRODUCTS(Singles, float, f)
#ifdef HAS_PAIRS
PRODUCTS(Pairs, bf16, b)
#endif
