// Forward pass of causal attention inside documents. A task is a block of queries of all heads that share a key head. See attention.h.

#include <cmath>

#include "attention.h"

namespace {

const float LOWEST = -1e30f;  // maximum of a row without scores; finite, so that differences are not NaN

struct QueryBlock {  // a task: queries [first, stop) of one document, for all heads that share one key head
  int64_t document, key_head, first, stop;
  int64_t cost(int64_t window) const { return (stop - first) * std::min(stop, window + stop - first); }
};

// Online softmax of TILE_ROWS queries over some vectors of keys: updates `row_max` and `sums`, and adds the weighted values to `out`.
template <class F>
void forward_strip(const Unit<F> *q, const Unit<F> *k, const Unit<F> *v, const Plan &plan, float scale, int64_t position, int64_t key,
                   int64_t from, int64_t vectors, float *row_max, float *sums, float *out) {
  alignas(64) float scores[TILE_ROWS * F::KEY_BLOCK];
  alignas(64) Element<F> probabilities[TILE_ROWS * F::KEY_BLOCK];
  int64_t units = plan.head_size / F::PER_UNIT, value_size = plan.value_size;
  multiply_rows<F, TILE_ROWS, false>(q, units, 1, k + from * units * LANES, LANES, units * LANES, units, scores, F::KEY_BLOCK, vectors);
  VisibleToAll visible_to_all(position, key + from * LANES, plan.window);
  for (int r = 0; r < TILE_ROWS; r++) {
    float *row = scores + r * F::KEY_BLOCK;
    FloatVec block_max = broadcast(LOWEST), total = {};
    for (int64_t n = 0; n < vectors; n++) {
      FloatVec x = load(row + n * LANES) * scale;
      if (!visible_to_all.contains(n)) x = visible(position + r, key + (from + n) * LANES, plan.window) ? x : broadcast(MINUS_INFINITY);
      store(row + n * LANES, x);
      block_max = maximum(block_max, x);
    }
    float old_max = row_max[r], new_max = std::max(old_max, reduce_max(block_max));
    for (int64_t n = 0; n < vectors; n++) {
      FloatVec x = F::exp2_approx(load(row + n * LANES) - new_max);
      total += x;
      F::store_elements(probabilities + r * F::KEY_BLOCK + n * LANES, x);
    }
    if (new_max > old_max && old_max > LOWEST) {
      FloatVec rescale = F::exp2_approx(broadcast(old_max - new_max));
      store(sums + r * LANES, load(sums + r * LANES) * rescale);
      for (int64_t i = 0; i < value_size; i += LANES) store(out + r * value_size + i, load(out + r * value_size + i) * rescale);
    }
    row_max[r] = new_max;
    store(sums + r * LANES, load(sums + r * LANES) + total);
  }
  multiply_rows<F, TILE_ROWS, true>((const Unit<F> *)probabilities, F::KEY_BLOCK / F::PER_UNIT, 1,
                                    v + from * LANES / F::PER_UNIT * value_size, value_size, LANES, vectors * LANES / F::PER_UNIT, out,
                                    value_size, value_size / LANES);
}

template <class F>
struct ForwardScratch {
  Scratch<Unit<F>> q, k, v;
  Scratch<float> row_max, sums, out;
  explicit ForwardScratch(const Plan &p)
      : q(p.group() * QUERY_BLOCK * p.head_size / F::PER_UNIT),
        k(F::KEY_BLOCK * p.head_size / F::PER_UNIT),
        v(F::KEY_BLOCK * p.value_size / F::PER_UNIT),
        row_max(p.group() * QUERY_BLOCK),
        sums(p.group() * QUERY_BLOCK * LANES),
        out(p.group() * QUERY_BLOCK * p.value_size) {}
};

template <class F>
void forward_block(const Element<F> *q, const Element<F> *k, const Element<F> *v, Element<F> *out, float *logs, const Plan &plan,
                   int64_t start, const QueryBlock &block, float scale, ForwardScratch<F> &scratch) {
  int64_t group = plan.group(), size = plan.head_size, value_size = plan.value_size, rows = round_up(block.stop - block.first, TILE_ROWS);
  HeadRows<F> keys = head_rows<F>(k, plan.k_stride, block.key_head, size, plan, start);
  HeadRows<F> values = head_rows<F>(v, plan.v_stride, block.key_head, value_size, plan, start);
  for (int64_t g = 0; g < group; g++) {
    HeadRows<F> queries = head_rows<F>(q, plan.q_stride, block.key_head * group + g, size, plan, start);
    for (int64_t r = 0; r < rows; r++) {
      Unit<F> *to = scratch.q.data + (g * rows + r) * size / F::PER_UNIT;
      copy_row<F>(queries.at(std::min(block.first + r, block.stop - 1)), size, to);
    }
  }
  std::fill_n(scratch.row_max.data, group * rows, LOWEST);
  std::fill_n(scratch.sums.data, group * rows * LANES, 0.0f);
  std::fill_n(scratch.out.data, group * rows * value_size, 0.0f);
  for (int64_t key = std::max<int64_t>(0, block.first + 1 - plan.window) / LANES * LANES; key < block.stop; key += F::KEY_BLOCK) {
    int64_t keys_here = round_up(std::min(F::KEY_BLOCK, block.stop - key), LANES);
    pack_rows<F>(keys, key, keys_here, block.stop, size, scratch.k.data);
    pack_interleaved<F>(values, key, keys_here, block.stop, value_size, scratch.v.data);
    for (int64_t row = 0; row < group * rows; row += TILE_ROWS) {
      int64_t position = block.first + row % rows;
      int64_t from = std::max<int64_t>(0, position + 1 - plan.window - key) / LANES;
      int64_t to = std::min(keys_here, std::min(position + TILE_ROWS, block.stop) - key + LANES - 1) / LANES;
      if (to > from)
        forward_strip<F>(scratch.q.data + row * size / F::PER_UNIT, scratch.k.data, scratch.v.data, plan, scale, position, key, from,
                         to - from, scratch.row_max.data + row, scratch.sums.data + row * LANES, scratch.out.data + row * value_size);
    }
  }
  for (int64_t row = 0; row < group * rows; row++) {
    int64_t position = block.first + row % rows, head = block.key_head * group + row / rows;
    if (position >= block.stop) continue;
    int64_t index = (position < plan.shared ? position : start + position - plan.shared) * plan.heads + head;
    float total = reduce_sum(load(scratch.sums.data + row * LANES)), inverse = 1 / total;
    logs[index] = scratch.row_max.data[row] + std::log2(total);
    for (int64_t i = 0; i < value_size; i += LANES)
      F::store_elements(out + index * value_size + i, load(scratch.out.data + row * value_size + i) * inverse);
  }
}

template <class F>
void forward(const Element<F> *q, const Element<F> *k, const Element<F> *v, Element<F> *out, float *logs, const Plan *plan, float scale,
             int threads) {
  std::vector<int64_t> starts = document_starts(*plan);
  std::vector<QueryBlock> blocks;
  for (int64_t d = 0; d < plan->documents; d++) {
    int64_t first = d ? plan->shared : 0, count = plan->lengths[d] - first;
    int64_t step = round_up(ceil_div(count, ceil_div(count, QUERY_BLOCK)), TILE_ROWS);
    for (; first < plan->lengths[d]; first += step)
      for (int64_t head = 0; head < plan->key_heads; head++) blocks.push_back({d, head, first, std::min(first + step, plan->lengths[d])});
  }
  std::stable_sort(blocks.begin(), blocks.end(), [&](auto &a, auto &b) { return a.cost(plan->window) > b.cost(plan->window); });
#pragma omp parallel num_threads(threads)
  {
    ForwardScratch<F> scratch(*plan);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < blocks.size(); i++)
      forward_block<F>(q, k, v, out, logs, *plan, starts[blocks[i].document], blocks[i], scale * LOG2E, scratch);
  }
}

}  // namespace

#define FORWARD(F, X, letter)                                                                                                        \
  extern "C" void attention_forward_##letter(const X *q, const X *k, const X *v, X *out, float *logs, const Plan *plan, float scale, \
                                             int threads) {                                                                          \
    forward<F>(q, k, v, out, logs, plan, scale, threads);                                                                            \
  }

FORWARD(Float32, float, f)
#ifdef HAS_BF16_PAIRS
FORWARD(Bf16Pairs, bf16, b)
#endif
