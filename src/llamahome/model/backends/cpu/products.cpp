// Matrix products for the linear layers of a decoder, summed in float32. native.py compiles them on the user's machine.
//
// The right operand is packed on the fly into panels of TILE_VECTORS vectors of columns, one unit (formats.h) of the summed dimension after
// the other. Packing takes 1 to 3 % of the time for 500 rows, and no transposed or concatenated copy of the weights is needed. Tiles of
// TILE_ROWS rows of sums stay in registers. Each sum is computed in a fixed order, so the number of threads does not change a bit.
// docs/log.md compares the speed with torch's products. bfloat16 products are compiled only with AVX512_BF16; otherwise torch multiplies.

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <type_traits>
#include <vector>

#include "panels.h"

namespace {

constexpr int64_t PACKING_COST = 8;  // cost of packing a panel, in tiles; it only decides how threads share the work

// Memory that a thread keeps between calls.
struct ThreadScratch {
  void *data = nullptr;
  size_t bytes = 0;
  template <class X>
  X *reserve(int64_t count) {
    size_t needed = (count * sizeof(X) + 63) / 64 * 64;
    if (needed > bytes) {
      free(data);
      data = aligned_alloc(64, needed);
      bytes = needed;
    }
    return static_cast<X *>(data);
  }
};
thread_local ThreadScratch panel_scratch, sum_scratch, row_scratch, tail_scratch;

// Tiles of rows [row, row_stop) times panels [panel, panel_stop).
struct WorkRange {
  int64_t row, row_stop, panel, panel_stop;
};
// The share of one thread in `rows` tiles and `panels` panels. Threads form the grid whose slowest thread has the least work.
WorkRange split_work(int64_t rows, int64_t panels, int thread, int threads) {
  int64_t best = INT64_MAX, across = 1;
  for (int64_t c = 1; c <= threads; c++) {
    if (threads % c) continue;
    int64_t down = threads / c, cost = ceil_div(panels, c) * (ceil_div(rows, down) + PACKING_COST);
    if (cost < best) best = cost, across = c;
  }
  int64_t down = threads / across, r = thread / across, c = thread % across;
  return {rows * r / down, rows * (r + 1) / down, panels * c / across, panels * (c + 1) / across};
}

// Number of chunks of equal depth, a multiple of 32 and about `max_depth` at most, that cover `size`.
int64_t split_depth(int64_t size, int64_t max_depth, int64_t *depth) {
  int64_t chunks = std::max<int64_t>(1, ceil_div(size, max_depth));
  *depth = ceil_div(ceil_div(size, chunks), 32) * 32;
  return ceil_div(size, *depth);
}

// out [T, N] = x [T, S] * w + low [T, R] * factor [R, N] + bias [N]; see `multiply`.
template <class F>
struct Product {
  using element = Element<F>;
  using unit = Unit<F>;
  const element *x;
  int64_t x_stride;
  std::vector<const element *> rows, factor_rows;
  int64_t size, columns;  // S, N
  bool transposed;
  const element *low;
  int64_t rank;
  const float *bias;
  element *out;
  int64_t tokens, depth, chunks, low_units, panel_units, group;  // depth of a chunk; group: panels that are packed at a time

  // Pack panels [first, last) of one chunk of the summed dimension, and below them those of the low-rank factor.
  void pack(int64_t first, int64_t last, int64_t from, int64_t depth_here, bool with_factor, unit *packed) const {
    int64_t left = std::min(last * PANEL<F>, columns) - first * PANEL<F>;
    for (int64_t q = first; q < last && transposed; q++)
      pack_rows<F>(&rows[q * PANEL<F>], left - (q - first) * PANEL<F>, from, depth_here, packed + (q - first) * panel_units);
    if (!transposed) pack_columns<F>(&rows[from], depth_here, first * PANEL<F>, left, packed, panel_units);
    if (with_factor && low)
      pack_columns<F>(factor_rows.data(), rank, first * PANEL<F>, left, packed + depth_here / F::PER_UNIT * PANEL<F>, panel_units);
  }

  // Copy the last rows and repeat the final one up to a whole tile, so that nothing is read past the end.
  void pack_tail(int64_t from, int64_t depth_here, element *tail) const {
    for (int64_t r = 0, t = tokens / F::TILE_ROWS * F::TILE_ROWS; r < F::TILE_ROWS; r++) {
      std::copy_n(x + std::min(t + r, tokens - 1) * x_stride + from, depth_here, tail + r * depth);
      if (low) std::copy_n(low + std::min(t + r, tokens - 1) * rank, rank, tail + F::TILE_ROWS * depth + r * rank);
    }
  }

  // Multiply one chunk of a tile of rows and a panel. The last chunk writes the result, the others write to `partial`.
  void sum(int64_t chunk, int64_t tile, int64_t q, const unit *panel, const element *tail, float *partial, int64_t partial_stride) const {
    int64_t from = chunk * depth, depth_here = std::min(depth, size - from), t = tile * F::TILE_ROWS,
            height = std::min<int64_t>(F::TILE_ROWS, tokens - t);
    bool last = chunk + 1 == chunks, is_tail = height < F::TILE_ROWS;
    const element *left = is_tail ? tail : x + t * x_stride + from, *low_left = is_tail ? tail + F::TILE_ROWS * depth : low + t * rank;
    const float *start = chunk ? partial : bias ? bias + q * PANEL<F> : nullptr;
    int64_t width = std::min<int64_t>(PANEL<F>, columns - q * PANEL<F>), start_stride = chunk ? partial_stride : 0;
    Term<F> terms[2] = {{(const unit *)left, (is_tail ? depth : x_stride) / F::PER_UNIT, panel, depth_here / F::PER_UNIT},
                        {(const unit *)low_left, rank / F::PER_UNIT, panel + depth_here / F::PER_UNIT * PANEL<F>, last ? low_units : 0}};
    if (last)
      multiply_any_tile<F, 1>(terms, start, start_stride, out + t * columns + q * PANEL<F>, columns, height, width);
    else
      multiply_any_tile<F, 1>(terms, start, start_stride, partial, partial_stride, height, width);
  }

  void run(const WorkRange &range) const {
    constexpr bool SEPARATE_SUMS = !std::is_same<element, float>::value;
    int64_t slab = SEPARATE_SUMS ? F::SLAB_ROWS / F::TILE_ROWS : INT64_MAX / 2, partial_stride = SEPARATE_SUMS ? group * PANEL<F> : columns;
    unit *packed = panel_scratch.reserve<unit>(group * panel_units);
    float *partial_sums = SEPARATE_SUMS && chunks > 1 ? sum_scratch.reserve<float>(F::SLAB_ROWS * group * PANEL<F>) : nullptr;
    element *tail = tail_scratch.reserve<element>(F::TILE_ROWS * (depth + rank));
    for (int64_t first = range.panel, last; first < range.panel_stop; first = last) {
      last = std::min(first + group, range.panel_stop);
      for (int64_t row = range.row, row_stop; row < range.row_stop; row = row_stop) {
        row_stop = std::min(row + slab, range.row_stop);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          int64_t from = chunk * depth, depth_here = std::min(depth, size - from);
          if (chunks > 1 || row == range.row) pack(first, last, from, depth_here, chunk + 1 == chunks, packed);
          if (row_stop * F::TILE_ROWS > tokens) pack_tail(from, depth_here, tail);
          for (int64_t block = row; block < row_stop; block += F::BLOCK_TILES)
            for (int64_t q = first; q < last; q++)
              for (int64_t tile = block; tile < std::min(block + F::BLOCK_TILES, row_stop); tile++) {
                float *partial = (float *)out + tile * F::TILE_ROWS * columns + q * PANEL<F>;
                if (SEPARATE_SUMS) partial = partial_sums + (tile - row) * F::TILE_ROWS * partial_stride + (q - first) * PANEL<F>;
                sum(chunk, tile, q, packed + (q - first) * panel_units, tail, partial, partial_stride);
              }
        }
      }
    }
  }
};

// out = x * w + low * factor + bias, where w is a stack of `count` matrices [heights[i], width], transposed (S = width, N = sum of heights)
// or not (S = sum of heights, N = width). S and R are whole units; low and bias may be null.
template <class F>
void multiply(const Element<F> *x, int64_t x_stride, const Element<F> *const *parts, const int64_t *heights, int64_t count, int64_t width,
              int transposed, const Element<F> *low, const Element<F> *factor, int64_t rank, const float *bias, Element<F> *out,
              int64_t tokens, int threads) {
  std::vector<const Element<F> *> rows, factor_rows;
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < heights[i]; r++) rows.push_back(parts[i] + r * width);
  int64_t size = transposed ? width : rows.size(), columns = transposed ? rows.size() : width, depth;
  int64_t chunks = split_depth(size, F::DEPTH, &depth), panels = ceil_div(columns, PANEL<F>), tiles = ceil_div(tokens, F::TILE_ROWS);
  for (int64_t r = 0; low && r < rank; r++) factor_rows.push_back(factor + r * columns);
  int64_t low_units = low ? rank / F::PER_UNIT : 0, panel_units = (depth / F::PER_UNIT + low_units) * PANEL<F>;
  int64_t group = std::max<int64_t>(1, F::PACKED_BYTES / (panel_units * sizeof(Unit<F>)));
  Product<F> product = {x,
                        x_stride,
                        std::move(rows),
                        std::move(factor_rows),
                        size,
                        columns,
                        transposed != 0,
                        low,
                        rank,
                        bias,
                        out,
                        tokens,
                        depth,
                        chunks,
                        low_units,
                        panel_units,
                        group};
#pragma omp parallel num_threads(threads)
  product.run(split_work(tiles, panels, omp_get_thread_num(), omp_get_num_threads()));
}

// low [T, R] = x * first^T, where first is [R, S], and out = x * w + low * second [R, N] + bias.
template <class F>
void multiply_adapted(const Element<F> *x, int64_t x_stride, const Element<F> *const *parts, const int64_t *heights, int64_t count,
                      int64_t width, int transposed, const Element<F> *first, const Element<F> *second, int64_t rank, const float *bias,
                      Element<F> *low, Element<F> *out, int64_t tokens, int threads) {
  int64_t size = transposed ? width : std::accumulate(heights, heights + count, int64_t(0));
  multiply<F>(x, x_stride, &first, &rank, 1, size, 1, nullptr, nullptr, 0, nullptr, low, tokens, threads);
  multiply<F>(x, x_stride, parts, heights, count, width, transposed, low, second, rank, bias, out, tokens, threads);
}

// out [N, M] float32 = (add ? out : 0) + left [T, N]^T * right [T, M]: the gradient of a weight.
template <class F>
void multiply_outer(const Element<F> *left, int64_t left_stride, int64_t left_columns, const Element<F> *right, int64_t right_stride,
                    int64_t columns, float *out, int add, int64_t tokens, int threads) {
  constexpr int64_t STRIP = F::STRIP_TILES * F::TILE_ROWS;
  int64_t depth, chunks = split_depth(tokens, F::OUTER_DEPTH, &depth), units = depth / F::PER_UNIT, panel_units = units * PANEL<F>;
  int64_t panels = ceil_div(columns, PANEL<F>), strips = ceil_div(left_columns, STRIP);
  int64_t group = std::max<int64_t>(1, F::OUTER_PACKED_BYTES / (panel_units * sizeof(Unit<F>)));
#pragma omp parallel num_threads(threads)
  {
    WorkRange range = split_work(F::STRIP_TILES * strips, panels, omp_get_thread_num(), omp_get_num_threads());
    auto *packed = panel_scratch.reserve<Unit<F>>(group * panel_units), *tiles = row_scratch.reserve<Unit<F>>(units * STRIP);
    std::vector<const Element<F> *> left_rows(depth), right_rows(depth);
    for (int64_t first = range.panel; first < range.panel_stop; first += group)
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t from = chunk * depth, depth_here = std::min(depth, tokens - from), last = std::min(first + group, range.panel_stop);
        for (int64_t t = 0; t < depth_here; t++) {
          left_rows[t] = left + (from + t) * left_stride;
          right_rows[t] = right + (from + t) * right_stride;
        }
        int64_t column = first * PANEL<F>;
        pack_columns<F>(right_rows.data(), depth_here, column, std::min(last * PANEL<F>, columns) - column, packed, panel_units);
        for (int64_t n = range.row * F::TILE_ROWS, end = std::min(range.row_stop * F::TILE_ROWS, left_columns); n < end; n += STRIP) {
          int64_t stop = std::min(n + STRIP, end);
          pack_tiles<F>(left_rows.data(), depth_here, n, std::min(STRIP, left_columns - n), tiles, units * F::TILE_ROWS);
          for (int64_t block = n; block < stop; block += F::BLOCK_TILES * F::TILE_ROWS)
            for (int64_t q = first; q < last; q++)
              for (int64_t i = block; i < std::min(block + F::BLOCK_TILES * F::TILE_ROWS, stop); i += F::TILE_ROWS) {
                float *to = out + i * columns + q * PANEL<F>;
                Term<F> terms[2] = {{tiles + (i - n) * units, 1, packed + (q - first) * panel_units, ceil_div(depth_here, F::PER_UNIT)},
                                    {}};
                int64_t height = std::min<int64_t>(F::TILE_ROWS, left_columns - i),
                        width = std::min<int64_t>(PANEL<F>, columns - q * PANEL<F>);
                multiply_any_tile<F, F::TILE_ROWS>(terms, chunk || add ? to : nullptr, columns, to, columns, height, width);
              }
        }
      }
  }
}

}  // namespace

#define PRODUCTS(F, X, letter)                                                                                                           \
  extern "C" void product_##letter(const X *x, int64_t x_stride, const X *const *parts, const int64_t *heights, int64_t count,           \
                                   int64_t width, int transposed, const float *bias, X *out, int64_t tokens, int threads) {              \
    multiply<F>(x, x_stride, parts, heights, count, width, transposed, nullptr, nullptr, 0, bias, out, tokens, threads);                 \
  }                                                                                                                                      \
  extern "C" void adapted_product_##letter(const X *x, int64_t x_stride, const X *const *parts, const int64_t *heights, int64_t count,   \
                                           int64_t width, int transposed, const X *first, const X *second, int64_t rank,                 \
                                           const float *bias, X *low, X *out, int64_t tokens, int threads) {                             \
    multiply_adapted<F>(x, x_stride, parts, heights, count, width, transposed, first, second, rank, bias, low, out, tokens, threads);    \
  }                                                                                                                                      \
  extern "C" void outer_product_##letter(const X *left, int64_t left_stride, int64_t left_columns, const X *right, int64_t right_stride, \
                                         int64_t columns, float *out, int add, int64_t tokens, int threads) {                            \
    multiply_outer<F>(left, left_stride, left_columns, right, right_stride, columns, out, add, tokens, threads);                         \
  }

PRODUCTS(Float32, float, f)
#ifdef HAS_BF16_PAIRS
PRODUCTS(Bf16Pairs, bf16, b)
#endif
