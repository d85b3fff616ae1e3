// Products of bfloat16 matrices for the linear layers of a decoder, summed in float32; compiled on the user's machine by native.py.
//
// One operand is packed as it is needed: panels of 48 columns, two numbers of the summed direction side by side, as the processor's
// instruction for pairs wants them. Packing takes 1 to 3 % of the time of 500 rows and spares a turned or joined copy of the weights. Tiles of
// 8 by 48 sums stay in registers. Every sum runs in one order, so results are the same bits whatever the number of threads.
// Measured beside torch's products: docs/log.md. Without the instruction (AVX512_BF16) nothing is made and torch multiplies.

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "pairs.h"

using half = uint16_t;  // a bfloat16

constexpr int TILE = 8, VECTORS = 3, PANEL = 16 * VECTORS;
constexpr int64_t DEPTH = 1536;            // numbers summed before a tile's sums are put aside: its rows fit the first cache; half for outer products
constexpr int64_t PACKED_BYTES = 500'000;  // of panels for one thread: half of a second cache of 1 MB
constexpr int64_t AHEAD = 16;              // rows that are asked of memory before they are packed: pieces of rows that lie apart come unasked too late
constexpr int64_t SLAB = 2048;             // rows whose sums may lie aside at once
constexpr int64_t PACKING = 8;             // what packing a panel costs, in tiles; only decides who does what

static inline __mmask16 mask(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

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
static thread_local Room panel_room, sum_room, row_room, tail_room;

// A panel whose columns are rows of the matrix: numbers [from, from + size) of `count` rows.
static void pack_rows(const half *const *rows, int64_t count, int64_t from, int64_t size, pair *to) {
  for (int v = 0; v < VECTORS; v++)
    for (int64_t p = 0; p < size / 2; p += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        bool there = 16 * v + i < count;
        block[i] = _mm512_maskz_loadu_epi32(there ? mask(size / 2 - p) : 0, rows[there ? 16 * v + i : 0] + from + 2 * p);
      }
      turn(block);
      for (int64_t i = 0; i < std::min<int64_t>(16, size / 2 - p); i++) _mm512_storeu_si512(to + (p + i) * PANEL + 16 * v, block[i]);
    }
}

// Panels whose columns are columns of the matrix: `count` of them from `column` on, `size` rows; an odd last row is paired with zeros.
// Row by row over all panels, which lie `apart` pairs from each other, for memory gives what follows itself faster.
static void pack_columns(const half *const *rows, int64_t size, int64_t column, int64_t count, pair *to, int64_t apart) {
  for (int64_t p = 0; p < (size + 1) / 2; p++) {
    bool even = 2 * p + 1 < size;
    const half *above = rows[2 * p] + column, *below = rows[2 * p + even] + column;
    for (int64_t i = 0; i < count + 31 && 2 * p + 1 + AHEAD < size; i += 32)
      for (int64_t row : {2 * p, 2 * p + 1}) __builtin_prefetch(rows[row + AHEAD] + column + std::min(i, count - 1));
    for (int64_t q = 0; q * PANEL < count; q++)
      for (int v = 0; v < VECTORS; v++) {
        int64_t at = q * PANEL + 16 * v;
        __mmask16 some = mask(count - at);
        _mm512_storeu_si512(to + q * apart + p * PANEL + 16 * v, braid(above + at, some, below + at, even ? some : 0));
      }
  }
}

// Rows of a turned left operand: 32 columns as four tiles, each to[p * TILE + row]; tiles lie (size + 1) / 2 * TILE apart.
static void pack_tiles(const half *const *rows, int64_t size, int64_t column, int64_t count, pair *to) {
  int64_t pairs = (size + 1) / 2;
  for (int64_t p = 0; p < pairs; p++)
    for (int i = 0; i < 2; i++) {
      bool even = 2 * p + 1 < size;
      __mmask16 some = mask(count - 16 * i);
      __m512i both = braid(rows[2 * p] + column + 16 * i, some, rows[2 * p + even] + column + 16 * i, even ? some : 0);
      pair *tile = to + (2 * i * pairs + p) * TILE;
      _mm256_storeu_si256((__m256i *)tile, _mm512_castsi512_si256(both));
      _mm256_storeu_si256((__m256i *)(tile + pairs * TILE), _mm512_extracti64x4_epi64(both, 1));
    }
}

// A left operand, left[row * across + p * along] being pair p of a row, and the panel it is multiplied with.
struct Term {
  const pair *left;
  int64_t across;
  const pair *panel;
  int64_t pairs;
};

static inline void put(float *to, __mmask16 some, __m512 sums) { _mm512_mask_storeu_ps(to, some, sums); }
static inline void put(half *to, __mmask16 some, __m512 sums) {
  _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(sums));
}

// to = start + first + second, for 8 rows and 16, 32 or 48 columns, of which `rows` and `columns` are real; start may be null.
template <int along, int vectors, class To>
static void tile(Term first, Term second, const float *start, int64_t start_step, To *to, int64_t step, int64_t rows, int64_t columns) {
  __m512 sums[TILE][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++)
      sums[r][v] = start && r < rows ? _mm512_maskz_loadu_ps(mask(columns - 16 * v), start + r * start_step + 16 * v) : _mm512_setzero_ps();
  for (const Term &term : {first, second})
    for (int64_t p = 0; p < term.pairs; p++) {
      __m512bh y[vectors];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) y[v] = (__m512bh)_mm512_loadu_si512(term.panel + p * PANEL + 16 * v);
#pragma GCC unroll 8
      for (int r = 0; r < TILE; r++) {
        __m512bh x = (__m512bh)_mm512_set1_epi32(term.left[r * term.across + p * along]);
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, y[v]);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++)
      if (r < rows) put(to + r * step + 16 * v, mask(columns - 16 * v), sums[r][v]);
}

template <int along, class To>
static void any_tile(Term first, Term second, const float *start, int64_t start_step, To *to, int64_t step, int64_t rows,
                     int64_t columns) {
  if (columns > 32)
    tile<along, 3>(first, second, start, start_step, to, step, rows, columns);
  else if (columns > 16)
    tile<along, 2>(first, second, start, start_step, to, step, rows, columns);
  else
    tile<along, 1>(first, second, start, start_step, to, step, rows, columns);
}

// Which of `rows` tiles and `panels` panels a thread does: a grid of threads that leaves the slowest the least to do.
struct Share {
  int64_t row, row_stop, panel, panel_stop;
};
static Share share(int64_t rows, int64_t panels, int thread, int threads) {
  int64_t best = INT64_MAX, across = 1;
  for (int64_t c = 1; c <= threads; c++) {
    if (threads % c) continue;
    int64_t down = threads / c, cost = ((panels + c - 1) / c) * ((rows + down - 1) / down + PACKING);
    if (cost < best) best = cost, across = c;
  }
  int64_t down = threads / across, r = thread / across, c = thread % across;
  return {rows * r / down, rows * (r + 1) / down, panels * c / across, panels * (c + 1) / across};
}

static int64_t chunks_of(int64_t size, int64_t most, int64_t *depth) {
  int64_t chunks = std::max<int64_t>(1, (size + most - 1) / most);
  *depth = ((size + chunks - 1) / chunks + 31) / 32 * 32;
  return (size + *depth - 1) / *depth;
}

// out [T, N] = x [T, S] * w + low [T, R] * factor [R, N] + bias [N], where w consists of `parts` matrices below each other, each
// [heights[i], width], turned (S = width, N = all heights) or not (S = all heights, N = width). S and R are even; low and bias may be null.
static void multiply(const half *x, int64_t x_step, const half *const *parts, const int64_t *heights, int64_t count, int64_t width,
                     int turned, const half *low, const half *factor, int64_t rank, const float *bias, half *out, int64_t tokens,
                     int threads) {
  std::vector<const half *> rows, factor_rows;
  for (int64_t i = 0; i < count; i++)
    for (int64_t r = 0; r < heights[i]; r++) rows.push_back(parts[i] + r * width);
  int64_t size = turned ? width : rows.size(), columns = turned ? rows.size() : width, depth;
  int64_t chunks = chunks_of(size, DEPTH, &depth), panels = (columns + PANEL - 1) / PANEL, tiles = (tokens + TILE - 1) / TILE;
  for (int64_t r = 0; low && r < rank; r++) factor_rows.push_back(factor + r * columns);
  int64_t low_pairs = low ? rank / 2 : 0, panel_pairs = (depth / 2 + low_pairs) * PANEL;
  int64_t group = std::max<int64_t>(1, PACKED_BYTES / (panel_pairs * 4));
#pragma omp parallel num_threads(threads)
  {
    Share mine = share(tiles, panels, omp_get_thread_num(), omp_get_num_threads());
    pair *packed = panel_room.take<pair>(group * panel_pairs);
    float *aside = chunks > 1 ? sum_room.take<float>(SLAB * group * PANEL) : nullptr;
    half *tail = tail_room.take<half>(TILE * (depth + 2 * low_pairs));
    for (int64_t first = mine.panel; first < mine.panel_stop; first += group)
      for (int64_t slab = mine.row; slab < mine.row_stop; slab += SLAB / TILE)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          int64_t from = chunk * depth, here = std::min(depth, size - from), last = std::min(first + group, mine.panel_stop);
          int64_t extra = chunk + 1 == chunks ? low_pairs : 0;
          if (chunks > 1 || slab == mine.row) {
            int64_t left = std::min(last * PANEL, columns) - first * PANEL;
            for (int64_t q = first; q < last && turned; q++)
              pack_rows(&rows[q * PANEL], left - (q - first) * PANEL, from, here, packed + (q - first) * panel_pairs);
            if (!turned) pack_columns(&rows[from], here, first * PANEL, left, packed, panel_pairs);
            if (extra) pack_columns(factor_rows.data(), rank, first * PANEL, left, packed + here / 2 * PANEL, panel_pairs);
          }
          for (int64_t tile = slab; tile < std::min(slab + SLAB / TILE, mine.row_stop); tile++) {
            int64_t t = tile * TILE, height = std::min<int64_t>(TILE, tokens - t);
            const half *left = x + t * x_step + from, *lower = low + t * rank;
            int64_t left_step = x_step;
            if (height < TILE) {  // nothing is read past the last row
              for (int64_t r = 0; r < TILE; r++) {
                std::copy_n(x + std::min(t + r, tokens - 1) * x_step + from, here, tail + r * depth);
                if (extra) std::copy_n(low + std::min(t + r, tokens - 1) * rank, rank, tail + TILE * depth + r * rank);
              }
              left = tail, left_step = depth, lower = tail + TILE * depth;
            }
            for (int64_t q = first; q < last; q++) {
              const pair *panel = packed + (q - first) * panel_pairs;
              int64_t wide = std::min<int64_t>(PANEL, columns - q * PANEL), step = group * PANEL;
              float *own = aside + (t - slab * TILE) * step + (q - first) * PANEL;
              const float *start = chunk ? own : bias ? bias + q * PANEL : nullptr;
              Term main = {(const pair *)left, left_step / 2, panel, here / 2};
              Term more = {(const pair *)lower, rank / 2, panel + here / 2 * PANEL, extra};
              if (chunk + 1 < chunks)
                any_tile<1>(main, more, start, chunk ? step : 0, own, step, height, wide);
              else
                any_tile<1>(main, more, start, chunk ? step : 0, out + t * columns + q * PANEL, columns, height, wide);
            }
          }
        }
  }
}

extern "C" void product_b(const half *x, int64_t x_step, const half *const *parts, const int64_t *heights, int64_t count, int64_t width,
                          int turned, const float *bias, half *out, int64_t tokens, int threads) {
  multiply(x, x_step, parts, heights, count, width, turned, nullptr, nullptr, 0, bias, out, tokens, threads);
}

// low [T, R] = x * first turned, with first [R, S], and out = x * w + low * second [R, N] + bias.
extern "C" void adapted_product_b(const half *x, int64_t x_step, const half *const *parts, const int64_t *heights, int64_t count,
                                  int64_t width, int turned, const half *first, const half *second, int64_t rank, const float *bias,
                                  half *low, half *out, int64_t tokens, int threads) {
  int64_t size = turned ? width : std::accumulate(heights, heights + count, int64_t(0));
  multiply(x, x_step, &first, &rank, 1, size, 1, nullptr, nullptr, 0, nullptr, low, tokens, threads);
  multiply(x, x_step, parts, heights, count, width, turned, low, second, rank, bias, out, tokens, threads);
}

// out [N, M] float32 = (add ? out : 0) + sum over tokens of left [T, N] by right [T, M]: gradients of weights.
extern "C" void outer_product_b(const half *left, int64_t left_step, int64_t wide, const half *right, int64_t right_step, int64_t columns,
                                float *out, int add, int64_t tokens, int threads) {
  constexpr int64_t STRIP = 4 * TILE;
  int64_t depth, chunks = chunks_of(tokens, DEPTH / 2, &depth), panel_pairs = depth / 2 * PANEL;
  int64_t panels = (columns + PANEL - 1) / PANEL, strips = (wide + STRIP - 1) / STRIP;
  int64_t group = std::max<int64_t>(1, PACKED_BYTES / (panel_pairs * 4));
#pragma omp parallel num_threads(threads)
  {
    Share mine = share(4 * strips, panels, omp_get_thread_num(), omp_get_num_threads());
    pair *packed = panel_room.take<pair>(group * panel_pairs), *tiles = row_room.take<pair>(depth / 2 * STRIP);
    std::vector<const half *> left_rows(depth), right_rows(depth);
    for (int64_t first = mine.panel; first < mine.panel_stop; first += group)
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t from = chunk * depth, here = std::min(depth, tokens - from), pairs = (here + 1) / 2;
        int64_t last = std::min(first + group, mine.panel_stop);
        for (int64_t t = 0; t < here; t++) {
          left_rows[t] = left + (from + t) * left_step;
          right_rows[t] = right + (from + t) * right_step;
        }
        pack_columns(right_rows.data(), here, first * PANEL, std::min(last * PANEL, columns) - first * PANEL, packed, panel_pairs);
        for (int64_t n = mine.row * TILE, end = std::min(mine.row_stop * TILE, wide); n < end; n += STRIP) {
          pack_tiles(left_rows.data(), here, n, std::min(STRIP, wide - n), tiles);
          for (int64_t i = 0; i < STRIP && n + i < end; i += TILE)
            for (int64_t q = first; q < last; q++) {
              float *to = out + (n + i) * columns + q * PANEL;
              Term main = {tiles + i * pairs, 1, packed + (q - first) * panel_pairs, pairs};
              int64_t height = std::min<int64_t>(TILE, wide - n - i), width = std::min<int64_t>(PANEL, columns - q * PANEL);
              any_tile<TILE>(main, {}, chunk || add ? to : nullptr, columns, to, columns, height, width);
            }
        }
      }
  }
}
#endif
