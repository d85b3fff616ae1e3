// Causal attention inside documents, forward: a task is a block of queries with the heads that share their keys. See attention.h.

#include <cmath>

#include "attention.h"

namespace {

const float LOWEST = -1e30f;  // top of a row that has seen nothing yet; finite, so that differences are numbers

struct Block {  // a forward task: queries of one document with the heads that share one key head
  int64_t document, key_head, first, stop;
  int64_t cost(int64_t window) const { return (stop - first) * std::min(stop, window + stop - first); }
};

// Six rows of queries against some vectors of keys: scores into `sums` and `top`, values into `out`.
template <class F>
void forward_strip(const Unit<F> *q, const Unit<F> *k, const Unit<F> *v, const Plan &plan, float scale, int64_t position, int64_t key,
                   int64_t from, int64_t vectors, float *top, float *sums, float *out) {
  alignas(64) float scores[ROWS * F::KEYS];
  alignas(64) Element<F> chances[ROWS * F::KEYS];
  int64_t units = plan.size / F::PER, width = plan.value_size;
  products<F, ROWS, false>(q, units, 1, k + from * units * LANES, LANES, units * LANES, units, scores, F::KEYS, vectors);
  Whole whole(position, key + from * LANES, plan.window);
  for (int r = 0; r < ROWS; r++) {
    float *line = scores + r * F::KEYS;
    floats most = all(LOWEST), total = {};
    for (int64_t n = 0; n < vectors; n++) {
      floats x = load(line + n * LANES) * scale;
      if (!whole.has(n)) x = seen(position + r, key + (from + n) * LANES, plan.window) ? x : all(HIDDEN);
      store(line + n * LANES, x);
      most = larger(most, x);
    }
    float before = top[r], now = std::max(before, largest(most));
    for (int64_t n = 0; n < vectors; n++) {
      floats x = F::power(load(line + n * LANES) - now);
      total += x;
      F::put(chances + r * F::KEYS + n * LANES, x);
    }
    if (now > before && before > LOWEST) {
      floats fade = F::power(all(before - now));
      store(sums + r * LANES, load(sums + r * LANES) * fade);
      for (int64_t i = 0; i < width; i += LANES) store(out + r * width + i, load(out + r * width + i) * fade);
    }
    top[r] = now;
    store(sums + r * LANES, load(sums + r * LANES) + total);
  }
  products<F, ROWS, true>((const Unit<F> *)chances, F::KEYS / F::PER, 1, v + from * LANES / F::PER * width, width, LANES,
                          vectors * LANES / F::PER, out, width, width / LANES);
}

template <class F>
struct Forward {  // what a thread needs for its forward tasks
  Room<Unit<F>> q, k, v;
  Room<float> top, sums, out;
  explicit Forward(const Plan &p)
      : q(p.group() * QUERIES * p.size / F::PER), k(F::KEYS * p.size / F::PER), v(F::KEYS * p.value_size / F::PER),
        top(p.group() * QUERIES), sums(p.group() * QUERIES * LANES), out(p.group() * QUERIES * p.value_size) {}
};

template <class F>
void forward_block(const Element<F> *q, const Element<F> *k, const Element<F> *v, Element<F> *out, float *logs, const Plan &plan,
                   int64_t start, const Block &block, float scale, Forward<F> &my) {
  int64_t group = plan.group(), size = plan.size, width = plan.value_size, rows = up(block.stop - block.first, ROWS);
  Rows<F> keys = rows_of<F>(k, plan.k_step, block.key_head, size, plan, start);
  Rows<F> values = rows_of<F>(v, plan.v_step, block.key_head, width, plan, start);
  for (int64_t g = 0; g < group; g++) {
    Rows<F> queries = rows_of<F>(q, plan.q_step, block.key_head * group + g, size, plan, start);
    for (int64_t r = 0; r < rows; r++) {
      Unit<F> *to = my.q.at + (g * rows + r) * size / F::PER;
      copy_row<F>(queries.at(std::min(block.first + r, block.stop - 1)), size, to);
    }
  }
  std::fill_n(my.top.at, group * rows, LOWEST);
  std::fill_n(my.sums.at, group * rows * LANES, 0.0f);
  std::fill_n(my.out.at, group * rows * width, 0.0f);
  for (int64_t key = std::max<int64_t>(0, block.first + 1 - plan.window) / LANES * LANES; key < block.stop; key += F::KEYS) {
    int64_t wide = up(std::min(F::KEYS, block.stop - key), LANES);
    pack_rows<F>(keys, key, wide, block.stop, size, my.k.at);
    pack_below<F>(values, key, wide, block.stop, width, my.v.at);
    for (int64_t row = 0; row < group * rows; row += ROWS) {
      int64_t position = block.first + row % rows;
      int64_t from = std::max<int64_t>(0, position + 1 - plan.window - key) / LANES;
      int64_t to = std::min(wide, std::min(position + ROWS, block.stop) - key + LANES - 1) / LANES;
      if (to > from)
        forward_strip<F>(my.q.at + row * size / F::PER, my.k.at, my.v.at, plan, scale, position, key, from, to - from, my.top.at + row,
                      my.sums.at + row * LANES, my.out.at + row * width);
    }
  }
  for (int64_t row = 0; row < group * rows; row++) {
    int64_t position = block.first + row % rows, head = block.key_head * group + row / rows;
    if (position >= block.stop) continue;
    int64_t place = (position < plan.shared ? position : start + position - plan.shared) * plan.heads + head;
    float total = sum(load(my.sums.at + row * LANES)), share = 1 / total;
    logs[place] = my.top.at[row] + std::log2(total);
    for (int64_t i = 0; i < width; i += LANES) F::put(out + place * width + i, load(my.out.at + row * width + i) * share);
  }
}

template <class F>
void forward(const Element<F> *q, const Element<F> *k, const Element<F> *v, Element<F> *out, float *logs, const Plan *plan, float scale,
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
    Forward<F> my(*plan);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < blocks.size(); i++)
      forward_block<F>(q, k, v, out, logs, *plan, starts[blocks[i].document], blocks[i], scale * LOG2E, my);
  }
}

}  // namespace

#define FORWARD(F, X, letter)                                                                                                    \
  extern "C" void attention_forward_##letter(const X *q, const X *k, const X *v, X *out, float *logs, const Plan *plan, float scale, \
                                             int threads) {                                                                      \
    forward<F>(q, k, v, out, logs, plan, scale, threads);                                                                        \
  }

FORWARD(Singles, float, f)
#ifdef HAS_PAIRS
FORWARD(Pairs, bf16, b)
#endif
