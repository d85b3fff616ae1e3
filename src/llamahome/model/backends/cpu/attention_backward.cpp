// Backward pass of causal attention inside documents. A task is a segment of keys with all queries that see it. See attention.h.
//
// A task computes the gradients of its keys and values, and its contribution to the gradient of the queries. If several segments contribute
// to a query, their partial gradients are summed afterwards, in the order of the segments. Of a long document they take several times the
// memory of the queries, so the heads then come one after the other, as few at a time as keep all threads busy.

#include "attention.h"

namespace {

const int64_t TILE_KEYS = 64;  // keys whose probabilities and score gradients are held at a time
const int64_t MAX_SEGMENTS = 16;  // of a document; more need more memory: each holds a partial gradient for the queries after it
const int64_t MAX_PARTIAL_BYTES = 1 << 25, TASKS_PER_THREAD = 4;  // of partial gradients beyond which not all heads come at once

struct QueryRange {  // queries [first, stop) of a document that see a segment
  int64_t document, first, stop;
  int64_t partial_row;  // row of the first query's partial gradient, or -1 if this segment is the only one
};

struct KeySegment {  // a task: keys [first, stop) of a document, for one key head; shared keys belong to the first document
  int64_t document, key_head, first, stop;
  const std::vector<QueryRange> *ranges;
  int64_t cost() const {
    int64_t rows = 0;
    for (const QueryRange &range : *ranges) rows += range.stop - range.first;
    return rows * (stop - first);
  }
};

template <class F>
struct BackwardScratch {
  Scratch<Unit<F>> k, v, k_interleaved, q, grad, q_interleaved, grad_interleaved, probabilities, score_grads;
  Scratch<Element<F>> by_row;
  Scratch<float> grad_k, grad_v, grad_q;
  float logs[QUERY_BLOCK], deltas[QUERY_BLOCK];
  int64_t keys;
  BackwardScratch(const Plan &p, int64_t keys)
      : k(keys * p.head_size / F::PER_UNIT),
        v(keys * p.value_size / F::PER_UNIT),
        k_interleaved(keys * p.head_size / F::PER_UNIT),
        q(QUERY_BLOCK * p.head_size / F::PER_UNIT),
        grad(QUERY_BLOCK * p.value_size / F::PER_UNIT),
        q_interleaved(QUERY_BLOCK * p.head_size / F::PER_UNIT),
        grad_interleaved(QUERY_BLOCK * p.value_size / F::PER_UNIT),
        probabilities(QUERY_BLOCK / F::PER_UNIT * TILE_KEYS),
        score_grads(QUERY_BLOCK / F::PER_UNIT * TILE_KEYS),
        by_row(QUERY_BLOCK * keys),
        grad_k(keys * p.head_size),
        grad_v(keys * p.value_size),
        grad_q(TILE_ROWS * p.head_size),
        keys(keys) {}
};

template <class F>
struct Tensors {
  const Element<F> *q, *k, *v, *grad, *out;
  const float *logs;
  Element<F> *grad_q, *grad_k, *grad_v;
  float *deltas, *partial_grad_q;
  int64_t first_head, heads;  // of the partial gradients
};

// Probabilities and score gradients of TILE_ROWS queries for some vectors of keys from `key` on, as units of rows; the score gradients also
// row by row. Keys from `key_stop` on do not exist: their score is 0, which may be so far above all others that its probability is infinite.
template <class F>
void backward_strip(BackwardScratch<F> &scratch, const Plan &plan, float scale, int64_t row, int64_t position, int64_t key, int64_t key_stop,
                    int64_t column, int64_t vectors, int64_t tile_keys) {
  alignas(64) float scores[TILE_ROWS * TILE_KEYS], grads[TILE_ROWS * TILE_KEYS];
  int64_t size = plan.head_size / F::PER_UNIT, value_size = plan.value_size / F::PER_UNIT;
  multiply_rows<F, TILE_ROWS, false>(scratch.q.data + row * size, size, 1, scratch.k.data + column * size, LANES, size * LANES, size,
                                     scores, TILE_KEYS, vectors);
  multiply_rows<F, TILE_ROWS, false>(scratch.grad.data + row * value_size, value_size, 1, scratch.v.data + column * value_size, LANES,
                                     value_size * LANES, value_size, grads, TILE_KEYS, vectors);
  VisibleToAll visible_to_all(position, key, plan.window);
  for (int r = 0; r < TILE_ROWS; r += F::PER_UNIT) {
    Unit<F> *probabilities = scratch.probabilities.data + (row + r) / F::PER_UNIT * TILE_KEYS,
            *score_grads = scratch.score_grads.data + (row + r) / F::PER_UNIT * TILE_KEYS;
    for (int64_t n = 0; n < vectors; n++) {
      FloatVec probability[F::PER_UNIT], score_grad[F::PER_UNIT];
#pragma GCC unroll 2
      for (int i = 0; i < F::PER_UNIT; i++) {
        int64_t at = (r + i) * TILE_KEYS + n * LANES;
        probability[i] = F::exp2_approx(load(scores + at) * scale - scratch.logs[row + r + i]);
        score_grad[i] = probability[i] * (load(grads + at) - scratch.deltas[row + r + i]);
        int64_t first = key + n * LANES;
        if (!visible_to_all.contains(n) || first + LANES > key_stop) {
          IntVec mask = visible(position + r + i, first, plan.window) & (lane_indices() < int32_t(key_stop - first));
          probability[i] = mask ? probability[i] : FloatVec{}, score_grad[i] = mask ? score_grad[i] : FloatVec{};
        }
      }
      F::store_interleaved(probabilities + n * LANES, probability);
      F::store_interleaved_and_rows(score_grads + n * LANES, scratch.by_row.data + (row + r) * scratch.keys + column + n * LANES,
                                    scratch.keys, score_grad);
    }
    for (int64_t key = vectors * LANES; key < std::min(tile_keys, vectors * LANES + TILE_ROWS - 1); key += LANES) {
      F::store(probabilities + key, typename F::vector{});  // TILE_ROWS keys that begin in the last vector may end in the next one
      F::store(score_grads + key, typename F::vector{});
    }
  }
}

// to[keys][size] += a^T b, where a (TILE_KEYS columns) and b are units of rows. Key i is not visible to rows before i + offset.
template <class F>
void multiply_transposed(const Unit<F> *a, const Unit<F> *b, int64_t from, int64_t stop, int64_t offset, int64_t keys, int64_t size,
                         float *to) {
  for (int64_t key = 0; key < keys; key += TILE_ROWS) {
    int64_t first = std::max(from, (key + offset) / F::PER_UNIT);
    auto multiply = key + TILE_ROWS <= keys ? multiply_rows<F, TILE_ROWS, true>
                    : key + 4 <= keys       ? multiply_rows<F, 4, true>
                                            : multiply_rows<F, 2, true>;
    multiply(a + key + first * TILE_KEYS, 1, TILE_KEYS, b + first * size, size, LANES, stop - first, to + key * size, size, size / LANES);
  }
}

// The gradient of TILE_ROWS queries from the keys of a segment: the final gradient if it is the only segment, otherwise a partial one.
template <class F>
void query_strip(BackwardScratch<F> &scratch, const Plan &plan, const Tensors<F> &tensors, const HeadRows<F> &grads,
                 const KeySegment &segment, const QueryRange &range, int64_t head, int64_t row, int64_t position, int64_t stop,
                 float scale) {
  int64_t size = plan.head_size, low = std::max<int64_t>(0, position - plan.window - (TILE_KEYS - 2) - segment.first);
  int64_t from = round_up(low, TILE_KEYS), to = round_up(std::min({position + TILE_ROWS, stop, segment.stop}) - segment.first, LANES);
  const Unit<F> *score_grads = (const Unit<F> *)(scratch.by_row.data + row * scratch.keys + from);
  multiply_rows<F, TILE_ROWS, false>(score_grads, scratch.keys / F::PER_UNIT, 1, scratch.k_interleaved.data + from / F::PER_UNIT * size,
                                     size, LANES, (to - from) / F::PER_UNIT, scratch.grad_q.data, size, size / LANES);
  for (int64_t r = 0; r < TILE_ROWS && position + r < stop; r++) {
    const float *in = scratch.grad_q.data + r * size;
    if (range.partial_row >= 0) {
      int64_t partial_row = range.partial_row + position + r - range.first;
      memcpy(tensors.partial_grad_q + (partial_row * tensors.heads + head - tensors.first_head) * size, in, size * sizeof(float));
      continue;
    }
    Element<F> *out = (Element<F> *)grads.at(position + r);
    for (int64_t i = 0; i < size; i += LANES) F::store_elements(out + i, load(in + i) * scale);
  }
}

template <class F>
void backward_block(BackwardScratch<F> &scratch, const Plan &plan, const Tensors<F> &tensors, const KeySegment &segment,
                    const QueryRange &range, int64_t start, int64_t head, int64_t first, int64_t stop, float scale) {
  int64_t size = plan.head_size, value_size = plan.value_size, rows = round_up(stop - first, TILE_ROWS), heads = plan.heads;
  HeadRows<F> queries = head_rows<F>(tensors.q, plan.q_stride, head, size, plan, start);
  HeadRows<F> grads = head_rows<F>(tensors.grad, heads * value_size, head, value_size, plan, start);
  HeadRows<F> grad_q = head_rows<F>(tensors.grad_q, heads * size, head, size, plan, start);
  for (int64_t r = 0; r < rows; r++) {
    bool exists = first + r < stop;
    int64_t position = exists ? first + r : first, token = position < plan.shared ? position : start + position - plan.shared;
    copy_row<F>(queries.at(position), size, scratch.q.data + r * size / F::PER_UNIT);
    copy_row<F>(grads.at(position), value_size, scratch.grad.data + r * value_size / F::PER_UNIT);
    scratch.logs[r] = exists ? tensors.logs[token * heads + head] : -MINUS_INFINITY;  // probabilities of rows that do not exist become zero
    scratch.deltas[r] = tensors.deltas[token * heads + head];
  }
  pack_interleaved<F>(queries, first, rows, stop, size, scratch.q_interleaved.data);
  pack_interleaved<F>(grads, first, rows, stop, value_size, scratch.grad_interleaved.data);
  for (int64_t key = segment.first; key < std::min(segment.stop, stop); key += TILE_KEYS) {
    int64_t column = key - segment.first, tile_keys = std::min(TILE_KEYS, round_up(segment.stop - key, LANES));
    int64_t from = std::max<int64_t>(0, key - first) / TILE_ROWS * TILE_ROWS,
            to = std::min(rows, round_up(key + TILE_KEYS - 1 + plan.window - first, TILE_ROWS));
    if (to <= from) continue;
    for (int64_t r = from; r < to; r += TILE_ROWS) {
      int64_t vectors = std::min(tile_keys, round_up(std::min(first + r + TILE_ROWS, stop) - key, LANES)) / LANES;
      backward_strip<F>(scratch, plan, scale * LOG2E, r, first + r, key, segment.stop, column, vectors, tile_keys);
    }
    multiply_transposed<F>(scratch.probabilities.data, scratch.grad_interleaved.data, from / F::PER_UNIT, to / F::PER_UNIT, key - first,
                           tile_keys, value_size, scratch.grad_v.data + column * value_size);
    multiply_transposed<F>(scratch.score_grads.data, scratch.q_interleaved.data, from / F::PER_UNIT, to / F::PER_UNIT, key - first,
                           tile_keys, size, scratch.grad_k.data + column * size);
  }
  for (int64_t r = 0; r < rows; r += TILE_ROWS)
    query_strip<F>(scratch, plan, tensors, grad_q, segment, range, head, r, first + r, stop, scale);
}

template <class F>
void backward_segment(BackwardScratch<F> &scratch, const Plan &plan, const Tensors<F> &tensors, const KeySegment &segment,
                      const std::vector<int64_t> &starts, float scale) {
  int64_t size = plan.head_size, value_size = plan.value_size, keys = round_up(segment.stop - segment.first, LANES),
          start = starts[segment.document];
  HeadRows<F> k = head_rows<F>(tensors.k, plan.k_stride, segment.key_head, size, plan, start);
  HeadRows<F> v = head_rows<F>(tensors.v, plan.v_stride, segment.key_head, value_size, plan, start);
  pack_rows<F>(k, segment.first, keys, segment.stop, size, scratch.k.data);
  pack_rows<F>(v, segment.first, keys, segment.stop, value_size, scratch.v.data);
  pack_interleaved<F>(k, segment.first, keys, segment.stop, size, scratch.k_interleaved.data);
  std::fill_n(scratch.grad_k.data, keys * size, 0.0f);
  std::fill_n(scratch.grad_v.data, keys * value_size, 0.0f);
  for (const QueryRange &range : *segment.ranges) {
    int64_t count = range.stop - range.first, step = round_up(ceil_div(count, ceil_div(count, QUERY_BLOCK)), TILE_ROWS);
    for (int64_t first = range.first; first < range.stop; first += step)
      for (int64_t head = segment.key_head * plan.group(); head < (segment.key_head + 1) * plan.group(); head++)
        backward_block<F>(scratch, plan, tensors, segment, range, starts[range.document], head, first, std::min(first + step, range.stop),
                          scale);
  }
  HeadRows<F> grad_k = head_rows<F>(tensors.grad_k, plan.key_heads * size, segment.key_head, size, plan, start);
  HeadRows<F> grad_v = head_rows<F>(tensors.grad_v, plan.key_heads * value_size, segment.key_head, value_size, plan, start);
  for (int64_t key = segment.first; key < segment.stop; key++) {
    const float *of_k = scratch.grad_k.data + (key - segment.first) * size,
                *of_v = scratch.grad_v.data + (key - segment.first) * value_size;
    Element<F> *to_k = (Element<F> *)grad_k.at(key), *to_v = (Element<F> *)grad_v.at(key);
    for (int64_t i = 0; i < size; i += LANES) F::store_elements(to_k + i, load(of_k + i) * scale);
    for (int64_t i = 0; i < value_size; i += LANES) F::store_elements(to_v + i, load(of_v + i));
  }
}

// Cut the keys into segments of at most `max_keys` keys, or MAX_SEGMENTS longer ones per document, and list the queries that see each
// segment in the order of the documents. Returns the number of rows of partial gradients; a document that is seen by one segment has none.
int64_t plan_segments(const Plan &plan, int64_t max_keys, std::vector<KeySegment> &segments, std::vector<std::vector<QueryRange>> &ranges) {
  auto add_segments = [&](int64_t document, int64_t first, int64_t stop) {
    int64_t count = std::min(MAX_SEGMENTS, ceil_div(stop - first, max_keys)),
            step = count ? round_up(ceil_div(stop - first, count), TILE_KEYS) : 1;
    for (; first < stop; first += step) segments.push_back({document, 0, first, std::min(first + step, stop), nullptr});
  };
  add_segments(0, 0, plan.shared);
  size_t common = segments.size();
  for (int64_t d = 0; d < plan.documents; d++) add_segments(d, plan.shared, plan.lengths[d]);
  std::vector<int64_t> range_counts(plan.documents);
  ranges.resize(segments.size());
  for (size_t s = 0; s < segments.size(); s++)
    for (int64_t d = s < common ? 0 : segments[s].document; d < (s < common ? plan.documents : segments[s].document + 1); d++) {
      int64_t first = d ? std::max(plan.shared, segments[s].first) : segments[s].first;
      int64_t stop = std::min(plan.lengths[d], segments[s].stop - 1 + plan.window);
      if (first < stop) ranges[s].push_back({d, first, stop, 0}), range_counts[d]++;
    }
  int64_t rows = 0;
  for (size_t s = 0; s < segments.size(); s++) {
    segments[s].ranges = &ranges[s];
    for (QueryRange &range : ranges[s]) {
      range.partial_row = range_counts[range.document] > 1 ? rows : -1;
      if (range.partial_row >= 0) rows += range.stop - range.first;
    }
  }
  return rows;
}

// Sum the partial gradients of the queries in the order of the segments.
template <class F>
void sum_partial_grads(const Plan &plan, const Tensors<F> &tensors, const std::vector<std::vector<QueryRange>> &ranges,
                       const std::vector<int64_t> &starts, float scale, int threads) {
  int64_t row = tensors.heads * plan.head_size, stride = plan.heads * plan.head_size, first_column = tensors.first_head * plan.head_size;
  std::vector<std::vector<QueryRange>> by_document(plan.documents);
  for (auto &of_segment : ranges)
    for (const QueryRange &range : of_segment)
      if (range.partial_row >= 0) by_document[range.document].push_back(range);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t d = 0; d < plan.documents; d++)
    for (int64_t position = d ? plan.shared : 0; !by_document[d].empty() && position < plan.lengths[d]; position++) {
      int64_t token = position < plan.shared ? position : starts[d] + position - plan.shared;
      for (int64_t i = 0; i < row; i += LANES) {
        FloatVec sum = {};
        for (const QueryRange &range : by_document[d])
          if (range.first <= position && position < range.stop)
            sum += load(tensors.partial_grad_q + (range.partial_row + position - range.first) * row + i);
        F::store_elements(tensors.grad_q + token * stride + first_column + i, sum * scale);
      }
    }
}

// Key heads whose partial gradients are there at a time.
int64_t heads_at_once(const Plan &plan, int64_t rows, int64_t segments, int threads) {
  if (rows * plan.heads * plan.head_size * int64_t(sizeof(float)) <= MAX_PARTIAL_BYTES) return plan.key_heads;
  return std::min(plan.key_heads, ceil_div(TASKS_PER_THREAD * threads, segments));
}

template <class F>
void backward(const Element<F> *grad, const Element<F> *q, const Element<F> *k, const Element<F> *v, const Element<F> *out,
              const float *logs, Element<F> *grad_q, Element<F> *grad_k, Element<F> *grad_v, const Plan *plan, float scale, int threads) {
  std::vector<int64_t> starts = document_starts(*plan);
  std::vector<KeySegment> segments;
  std::vector<std::vector<QueryRange>> ranges;
  int64_t rows = plan_segments(*plan, F::SEGMENT_KEYS, segments, ranges), last = plan->documents - 1;
  int64_t longest = 0, tokens = starts[last] + plan->lengths[last] - plan->shared;
  for (const KeySegment &segment : segments) longest = std::max(longest, round_up(segment.stop - segment.first, TILE_KEYS));
  int64_t most = heads_at_once(*plan, rows, segments.size(), threads), group = plan->group();
  Scratch<float> deltas(tokens * plan->heads), part(rows * most * group * plan->head_size);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tokens * plan->heads; i++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < plan->value_size; e++)
      sum += to_float(grad[i * plan->value_size + e]) * to_float(out[i * plan->value_size + e]);
    deltas.data[i] = sum;
  }
  for (int64_t first = 0; first < plan->key_heads; first += most) {
    int64_t stop = std::min(plan->key_heads, first + most);
    std::vector<KeySegment> tasks;
    for (KeySegment segment : segments)
      for (segment.key_head = first; segment.key_head < stop; segment.key_head++) tasks.push_back(segment);
    std::stable_sort(tasks.begin(), tasks.end(), [](auto &a, auto &b) { return a.cost() > b.cost(); });
    Tensors<F> tensors = {q, k, v, grad, out, logs, grad_q, grad_k, grad_v, deltas.data, part.data, first * group, (stop - first) * group};
#pragma omp parallel num_threads(threads)
    {
      BackwardScratch<F> scratch(*plan, longest);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < tasks.size(); i++) backward_segment<F>(scratch, *plan, tensors, tasks[i], starts, scale);
    }
    if (rows) sum_partial_grads<F>(*plan, tensors, ranges, starts, scale, threads);
  }
}

}  // namespace

#define BACKWARD(F, X, letter)                                                                                                    \
  extern "C" void attention_backward_##letter(const X *grad, const X *q, const X *k, const X *v, const X *out, const float *logs, \
                                              X *grad_q, X *grad_k, X *grad_v, const Plan *plan, float scale, int threads) {      \
    backward<F>(grad, q, k, v, out, logs, grad_q, grad_k, grad_v, plan, scale, threads);                                          \
  }

BACKWARD(Float32, float, f)
#ifdef HAS_BF16_PAIRS
BACKWARD(Bf16Pairs, bf16, b)
#endif
