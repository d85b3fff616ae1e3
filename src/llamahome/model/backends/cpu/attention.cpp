// Causal attention inside documents, forward: a task is a block of queries with the heads that share their keys. See attention.h.

#ifdef __AVX512BF16__
#include "attention.h"

namespace {

const int64_t TILE = 128;     // keys that lie in the first cache, as rows and as pairs
const float LOWEST = -1e30f;  // top of a row that has seen nothing yet; finite, so that differences are numbers

struct Block {  // a forward task: queries of one document with the heads that share one key head
  int64_t document, key_head, first, stop;
  int64_t cost(int64_t window) const { return (stop - first) * std::min(stop, window + stop - first); }
};

// Six rows of queries against keys [key, key + 16 vectors): scores into `sums` and `top`, values into `out`.
void forward_strip(const pair *q, const pair *k, const pair *v, const Plan &plan, float scale, int64_t position, int64_t key,
                          int64_t from, int64_t vectors, float *top, float *sums, float *out) {
  alignas(64) float scores[ROWS * TILE];
  alignas(64) bf16 chances[ROWS * TILE];
  int64_t half = plan.size / 2, width = plan.value_size, wide = vectors * 16;
  products<ROWS, false>(q, half, 1, k + from * half * 16, 16, half * 16, half, scores, TILE, vectors);
  Whole whole(position, key + from * 16, plan.window);
  for (int r = 0; r < ROWS; r++) {
    float *line = scores + r * TILE;
    __m512 most = _mm512_set1_ps(LOWEST), sum = _mm512_setzero_ps();
    for (int64_t n = 0; n < vectors; n++) {
      __m512 x = _mm512_mul_ps(_mm512_load_ps(line + n * 16), _mm512_set1_ps(scale));
      if (!whole.has(n)) x = _mm512_mask_mov_ps(_mm512_set1_ps(HIDDEN), seen(position + r, key + (from + n) * 16, plan.window), x);
      _mm512_store_ps(line + n * 16, x);
      most = _mm512_max_ps(most, x);
    }
    float before = top[r], now = std::max(before, _mm512_reduce_max_ps(most));
    __m512 all = _mm512_set1_ps(now);
    for (int64_t n = 0; n < vectors; n++) {
      __m512 x = power(_mm512_sub_ps(_mm512_load_ps(line + n * 16), all));
      sum = _mm512_add_ps(sum, x);
      _mm256_store_si256((__m256i *)(chances + r * TILE + n * 16), (__m256i)_mm512_cvtneps_pbh(x));
    }
    if (now > before && before > LOWEST) {
      __m512 fade = power(_mm512_set1_ps(before - now));
      _mm512_store_ps(sums + r * 16, _mm512_mul_ps(_mm512_load_ps(sums + r * 16), fade));
      for (int64_t i = 0; i < width; i += 16)
        _mm512_store_ps(out + r * width + i, _mm512_mul_ps(_mm512_load_ps(out + r * width + i), fade));
    }
    top[r] = now;
    _mm512_store_ps(sums + r * 16, _mm512_add_ps(_mm512_load_ps(sums + r * 16), sum));
  }
  products<ROWS, true>((const pair *)chances, TILE / 2, 1, v + from * 8 * width, width, 16, wide / 2, out, width, width / 16);
}

struct Forward {  // what a thread needs for its forward tasks
  Room<pair> q, k, v;
  Room<float> top, sums, out;
  explicit Forward(const Plan &p)
      : q(p.group() * QUERIES * p.size / 2), k(TILE * p.size / 2), v(TILE * p.value_size / 2), top(up(p.group() * QUERIES, 16)),
        sums(p.group() * QUERIES * 16), out(p.group() * QUERIES * p.value_size) {}
};

void forward_block(const void *q, const void *k, const void *v, bf16 *out, float *logs, const Plan &plan, int64_t start,
                          const Block &block, float scale, Forward &my) {
  int64_t group = plan.group(), size = plan.size, width = plan.value_size, rows = up(block.stop - block.first, ROWS);
  Rows keys = rows_of(k, plan.k_step, block.key_head, size, plan, start);
  Rows values = rows_of(v, plan.v_step, block.key_head, width, plan, start);
  for (int64_t g = 0; g < group; g++) {
    Rows queries = rows_of(q, plan.q_step, block.key_head * group + g, size, plan, start);
    for (int64_t r = 0; r < rows; r++) {
      pair *to = my.q.at + (g * rows + r) * size / 2;
      copy_row(queries.at(std::min(block.first + r, block.stop - 1)), size, to);
    }
  }
  std::fill_n(my.top.at, group * rows, LOWEST);
  std::fill_n(my.sums.at, group * rows * 16, 0.0f);
  std::fill_n(my.out.at, group * rows * width, 0.0f);
  for (int64_t key = std::max<int64_t>(0, block.first + 1 - plan.window) / 16 * 16; key < block.stop; key += TILE) {
    int64_t wide = up(std::min(TILE, block.stop - key), 16);
    pack_rows(keys, key, wide, block.stop, size, my.k.at);
    pack_pairs(values, key, wide, block.stop, width, my.v.at);
    for (int64_t row = 0; row < group * rows; row += ROWS) {
      int64_t position = block.first + row % rows;
      int64_t from = std::max<int64_t>(0, position + 1 - plan.window - key) / 16;
      int64_t to = std::min(wide, std::min(position + ROWS, block.stop) - key + 15) / 16;
      if (to > from)
        forward_strip(my.q.at + row * size / 2, my.k.at, my.v.at, plan, scale, position, key, from, to - from, my.top.at + row,
                      my.sums.at + row * 16, my.out.at + row * width);
    }
  }
  for (int64_t row = 0; row < group * rows; row++) my.sums.at[row] = _mm512_reduce_add_ps(_mm512_load_ps(my.sums.at + row * 16));
  for (int64_t row = 0; row < group * rows; row += 16)
    _mm512_store_ps(my.top.at + row, _mm512_add_ps(_mm512_load_ps(my.top.at + row), logarithm(_mm512_load_ps(my.sums.at + row))));
  for (int64_t row = 0; row < group * rows; row++) {
    int64_t position = block.first + row % rows, head = block.key_head * group + row / rows;
    if (position >= block.stop) continue;
    int64_t place = (position < plan.shared ? position : start + position - plan.shared) * plan.heads + head;
    __m512 share = _mm512_set1_ps(1 / my.sums.at[row]);
    logs[place] = my.top.at[row];
    for (int64_t i = 0; i < width; i += 16)
      put16(out + place * width + i, _mm512_mul_ps(_mm512_load_ps(my.out.at + row * width + i), share));
  }
}

}  // namespace

extern "C" void attention_forward_b(const void *q, const void *k, const void *v, bf16 *out, float *logs, const Plan *plan, float scale,
                                    int threads) {
  std::vector<int64_t> starts = beginnings(*plan);
  std::vector<Block> blocks;
  for (int64_t d = 0; d < plan->documents; d++) {
    int64_t first = d ? plan->shared : 0, count = plan->lengths[d] - first;
    int64_t step = up(parts(count, parts(count, QUERIES)), ROWS);
    for (; first < plan->lengths[d]; first += step)
      for (int64_t head = 0; head < plan->key_heads; head++) blocks.push_back({d, head, first, std::min(first + step, plan->lengths[d])});
  }
  std::stable_sort(blocks.begin(), blocks.end(), [&](auto &a, auto &b) { return a.cost(plan->window) > b.cost(plan->window); });
#pragma omp parallel num_threads(threads)
  {
    Forward my(*plan);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < blocks.size(); i++)
      forward_block(q, k, v, out, logs, *plan, starts[blocks[i].document], blocks[i], scale * LOG2E, my);
  }
}
#endif
