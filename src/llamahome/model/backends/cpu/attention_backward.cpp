// Causal attention inside documents, backward: a task is a segment of keys with all queries that see it. See attention.h.
//
// A task owns the gradients of its keys and values and writes a part of the queries' gradient; where several segments give to a query,
// the parts are summed afterwards in the order of the segments.

#include "attention.h"

namespace {

const int64_t TILE = 64;      // keys whose probabilities and slopes are worked on at once
const int64_t SEGMENTS = 16;  // tasks of a document, at most, then they are longer: a query has a part of its gradient from each before it

struct Visit {  // queries [first, stop) of a document that see a segment; their part of the gradient begins at row `at` + first
  int64_t document, first, stop, at;
};

struct Segment {  // a backward task: keys [first, stop) of a document (the shared ones of the first) under one key head
  int64_t document, key_head, first, stop;
  const std::vector<Visit> *visits;
  int64_t cost() const {
    int64_t rows = 0;
    for (const Visit &visit : *visits) rows += visit.stop - visit.first;
    return rows * (stop - first);
  }
};

template <class F>
struct Backward {  // what a thread needs for its backward tasks
  Room<Unit<F>> k, v, k_below, q, grad, q_below, grad_below, chances, slopes;
  Room<Element<F>> by_row;
  Room<float> grad_k, grad_v, grad_q;
  float logs[QUERIES], deltas[QUERIES];
  int64_t keys;
  Backward(const Plan &p, int64_t keys)
      : k(keys * p.size / F::PER), v(keys * p.value_size / F::PER), k_below(keys * p.size / F::PER), q(QUERIES * p.size / F::PER),
        grad(QUERIES * p.value_size / F::PER), q_below(QUERIES * p.size / F::PER), grad_below(QUERIES * p.value_size / F::PER),
        chances(QUERIES / F::PER * TILE), slopes(QUERIES / F::PER * TILE), by_row(QUERIES * keys), grad_k(keys * p.size),
        grad_v(keys * p.value_size), grad_q(ROWS * p.size), keys(keys) {}
};

template <class F>
struct Tensors {
  const Element<F> *q, *k, *v, *grad, *out;
  const float *logs;
  Element<F> *grad_q, *grad_k, *grad_v;
  float *deltas, *parts;
};

// Six rows of queries against keys [key, key + vectors): probabilities and the gradient of the scores, in units of rows and by row.
template <class F>
void backward_strip(Backward<F> &my, const Plan &plan, float scale, int64_t row, int64_t position, int64_t key, int64_t column,
                    int64_t vectors, int64_t wide) {
  alignas(64) float scores[ROWS * TILE], grads[ROWS * TILE];
  int64_t size = plan.size / F::PER, width = plan.value_size / F::PER;
  products<F, ROWS, false>(my.q.at + row * size, size, 1, my.k.at + column * size, LANES, size * LANES, size, scores, TILE, vectors);
  products<F, ROWS, false>(my.grad.at + row * width, width, 1, my.v.at + column * width, LANES, width * LANES, width, grads, TILE, vectors);
  Whole whole(position, key, plan.window);
  for (int r = 0; r < ROWS; r += F::PER) {
    Unit<F> *chances = my.chances.at + (row + r) / F::PER * TILE, *slopes = my.slopes.at + (row + r) / F::PER * TILE;
    for (int64_t n = 0; n < vectors; n++) {
      floats chance[F::PER], slope[F::PER];
#pragma GCC unroll 2
      for (int i = 0; i < F::PER; i++) {
        int64_t at = (r + i) * TILE + n * LANES;
        chance[i] = F::power(load(scores + at) * scale - my.logs[row + r + i]);
        slope[i] = chance[i] * (load(grads + at) - my.deltas[row + r + i]);
        if (!whole.has(n)) {
          ints see = seen(position + r + i, key + n * LANES, plan.window);
          chance[i] = see ? chance[i] : floats{}, slope[i] = see ? slope[i] : floats{};
        }
      }
      F::put_below(chances + n * LANES, chance);
      F::put_both(slopes + n * LANES, my.by_row.at + (row + r) * my.keys + column + n * LANES, my.keys, slope);
    }
    for (int64_t key = vectors * LANES; key < std::min(wide, vectors * LANES + ROWS - 1); key += LANES) {
      F::store(chances + key, typename F::vector{});  // six keys that begin in the rows' last vector may end in the next
      F::store(slopes + key, typename F::vector{});
    }
  }
}

// to[keys][size] += a^T b for a in units of rows, TILE apart, and b in units of rows. No row before i + lead sees key i.
template <class F>
void transposed(const Unit<F> *a, const Unit<F> *b, int64_t from, int64_t stop, int64_t lead, int64_t keys, int64_t size, float *to) {
  for (int64_t key = 0; key < keys; key += ROWS) {
    int64_t first = std::max(from, (key + lead) / F::PER);
    auto some = key + ROWS <= keys ? products<F, ROWS, true> : key + 4 <= keys ? products<F, 4, true> : products<F, 2, true>;
    some(a + key + first * TILE, 1, TILE, b + first * size, size, LANES, stop - first, to + key * size, size, size / LANES);
  }
}

// The gradient of six rows of queries from a segment's keys: as it will stay where these are all keys, else as a part.
template <class F>
void query_strip(Backward<F> &my, const Plan &plan, const Tensors<F> &all, const Rows<F> &grads, const Segment &segment, const Visit &visit,
                 int64_t head, int64_t row, int64_t position, int64_t stop, float scale) {
  int64_t size = plan.size, low = std::max<int64_t>(0, position - plan.window - (TILE - 2) - segment.first);
  int64_t from = up(low, TILE), to = up(std::min({position + ROWS, stop, segment.stop}) - segment.first, LANES);
  const Unit<F> *slopes = (const Unit<F> *)(my.by_row.at + row * my.keys + from);
  products<F, ROWS, false>(slopes, my.keys / F::PER, 1, my.k_below.at + from / F::PER * size, size, LANES, (to - from) / F::PER,
                           my.grad_q.at, size, size / LANES);
  for (int64_t r = 0; r < ROWS && position + r < stop; r++) {
    const float *in = my.grad_q.at + r * size;
    if (visit.at >= 0) {
      memcpy(all.parts + ((visit.at + position + r - visit.first) * plan.heads + head) * size, in, size * sizeof(float));
      continue;
    }
    Element<F> *out = (Element<F> *)grads.at(position + r);
    for (int64_t i = 0; i < size; i += LANES) F::put(out + i, load(in + i) * scale);
  }
}

template <class F>
void backward_block(Backward<F> &my, const Plan &plan, const Tensors<F> &all, const Segment &segment, const Visit &visit, int64_t start,
                    int64_t head, int64_t first, int64_t stop, float scale) {
  int64_t size = plan.size, width = plan.value_size, rows = up(stop - first, ROWS), heads = plan.heads;
  Rows<F> queries = rows_of<F>(all.q, plan.q_step, head, size, plan, start);
  Rows<F> grads = rows_of<F>(all.grad, heads * width, head, width, plan, start);
  Rows<F> grad_q = rows_of<F>(all.grad_q, heads * size, head, size, plan, start);
  for (int64_t r = 0; r < rows; r++) {
    bool there = first + r < stop;
    int64_t position = there ? first + r : first, token = position < plan.shared ? position : start + position - plan.shared;
    copy_row<F>(queries.at(position), size, my.q.at + r * size / F::PER);
    copy_row<F>(grads.at(position), width, my.grad.at + r * width / F::PER);
    my.logs[r] = there ? all.logs[token * heads + head] : -HIDDEN;  // a row beyond the last gets probabilities of zero
    my.deltas[r] = all.deltas[token * heads + head];
  }
  pack_below<F>(queries, first, rows, stop, size, my.q_below.at);
  pack_below<F>(grads, first, rows, stop, width, my.grad_below.at);
  for (int64_t key = segment.first; key < std::min(segment.stop, stop); key += TILE) {
    int64_t column = key - segment.first, wide = std::min(TILE, up(segment.stop - key, LANES));
    int64_t from = std::max<int64_t>(0, key - first) / ROWS * ROWS, to = std::min(rows, up(key + TILE - 1 + plan.window - first, ROWS));
    if (to <= from) continue;
    for (int64_t r = from; r < to; r += ROWS) {
      int64_t vectors = std::min(wide, up(std::min(first + r + ROWS, stop) - key, LANES)) / LANES;
      backward_strip<F>(my, plan, scale * LOG2E, r, first + r, key, column, vectors, wide);
    }
    transposed<F>(my.chances.at, my.grad_below.at, from / F::PER, to / F::PER, key - first, wide, width, my.grad_v.at + column * width);
    transposed<F>(my.slopes.at, my.q_below.at, from / F::PER, to / F::PER, key - first, wide, size, my.grad_k.at + column * size);
  }
  for (int64_t r = 0; r < rows; r += ROWS) query_strip<F>(my, plan, all, grad_q, segment, visit, head, r, first + r, stop, scale);
}

template <class F>
void backward_segment(Backward<F> &my, const Plan &plan, const Tensors<F> &all, const Segment &segment,
                      const std::vector<int64_t> &starts, float scale) {
  int64_t size = plan.size, width = plan.value_size, keys = up(segment.stop - segment.first, LANES), start = starts[segment.document];
  Rows<F> k = rows_of<F>(all.k, plan.k_step, segment.key_head, size, plan, start);
  Rows<F> v = rows_of<F>(all.v, plan.v_step, segment.key_head, width, plan, start);
  pack_rows<F>(k, segment.first, keys, segment.stop, size, my.k.at);
  pack_rows<F>(v, segment.first, keys, segment.stop, width, my.v.at);
  pack_below<F>(k, segment.first, keys, segment.stop, size, my.k_below.at);
  std::fill_n(my.grad_k.at, keys * size, 0.0f);
  std::fill_n(my.grad_v.at, keys * width, 0.0f);
  for (const Visit &visit : *segment.visits) {
    int64_t count = visit.stop - visit.first, step = up(parts(count, parts(count, QUERIES)), ROWS);
    for (int64_t first = visit.first; first < visit.stop; first += step)
      for (int64_t head = segment.key_head * plan.group(); head < (segment.key_head + 1) * plan.group(); head++)
        backward_block<F>(my, plan, all, segment, visit, starts[visit.document], head, first, std::min(first + step, visit.stop), scale);
  }
  Rows<F> grad_k = rows_of<F>(all.grad_k, plan.key_heads * size, segment.key_head, size, plan, start);
  Rows<F> grad_v = rows_of<F>(all.grad_v, plan.key_heads * width, segment.key_head, width, plan, start);
  for (int64_t key = segment.first; key < segment.stop; key++) {
    const float *of_k = my.grad_k.at + (key - segment.first) * size, *of_v = my.grad_v.at + (key - segment.first) * width;
    Element<F> *to_k = (Element<F> *)grad_k.at(key), *to_v = (Element<F> *)grad_v.at(key);
    for (int64_t i = 0; i < size; i += LANES) F::put(to_k + i, load(of_k + i) * scale);
    for (int64_t i = 0; i < width; i += LANES) F::put(to_v + i, load(of_v + i));
  }
}

// Which queries see which keys: per segment (of at most `most` keys, if SEGMENTS are enough) its visits, in the order of the documents.
// Documents that one visit covers have no parts.
int64_t plan_visits(const Plan &plan, int64_t most, std::vector<Segment> &segments, std::vector<std::vector<Visit>> &visits) {
  auto cut = [&](int64_t document, int64_t first, int64_t stop) {
    int64_t count = std::min(SEGMENTS, parts(stop - first, most)), step = count ? up(parts(stop - first, count), TILE) : 1;
    for (; first < stop; first += step) segments.push_back({document, 0, first, std::min(first + step, stop), nullptr});
  };
  cut(0, 0, plan.shared);
  size_t common = segments.size();
  for (int64_t d = 0; d < plan.documents; d++) cut(d, plan.shared, plan.lengths[d]);
  std::vector<int64_t> times(plan.documents);
  visits.resize(segments.size());
  for (size_t s = 0; s < segments.size(); s++)
    for (int64_t d = s < common ? 0 : segments[s].document; d < (s < common ? plan.documents : segments[s].document + 1); d++) {
      int64_t first = d ? std::max(plan.shared, segments[s].first) : segments[s].first;
      int64_t stop = std::min(plan.lengths[d], segments[s].stop - 1 + plan.window);
      if (first < stop) visits[s].push_back({d, first, stop, 0}), times[d]++;
    }
  int64_t rows = 0;
  for (size_t s = 0; s < segments.size(); s++) {
    segments[s].visits = &visits[s];
    for (Visit &visit : visits[s]) {
      visit.at = times[visit.document] > 1 ? rows : -1;
      if (visit.at >= 0) rows += visit.stop - visit.first;
    }
  }
  return rows;
}

// The parts of the queries' gradient, added in the order of the segments.
template <class F>
void sum_parts(const Plan &plan, const Tensors<F> &all, const std::vector<std::vector<Visit>> &visits,
               const std::vector<int64_t> &starts, float scale, int threads) {
  int64_t row = plan.heads * plan.size;
  std::vector<std::vector<Visit>> by_document(plan.documents);
  for (auto &each : visits)
    for (const Visit &visit : each)
      if (visit.at >= 0) by_document[visit.document].push_back(visit);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t d = 0; d < plan.documents; d++)
    for (int64_t position = d ? plan.shared : 0; !by_document[d].empty() && position < plan.lengths[d]; position++) {
      int64_t token = position < plan.shared ? position : starts[d] + position - plan.shared;
      for (int64_t i = 0; i < row; i += LANES) {
        floats sum = {};
        for (const Visit &visit : by_document[d])
          if (visit.first <= position && position < visit.stop)
            sum += load(all.parts + (visit.at + position - visit.first) * row + i);
        F::put(all.grad_q + token * row + i, sum * scale);
      }
    }
}

template <class F>
void backward(const Element<F> *grad, const Element<F> *q, const Element<F> *k, const Element<F> *v, const Element<F> *out,
              const float *logs, Element<F> *grad_q, Element<F> *grad_k, Element<F> *grad_v, const Plan *plan, float scale, int threads) {
  std::vector<int64_t> starts = beginnings(*plan);
  std::vector<Segment> segments, tasks;
  std::vector<std::vector<Visit>> visits;
  int64_t rows = plan_visits(*plan, F::SEGMENT, segments, visits), last = plan->documents - 1;
  int64_t longest = 0, tokens = starts[last] + plan->lengths[last] - plan->shared;
  for (const Segment &segment : segments) {
    longest = std::max(longest, up(segment.stop - segment.first, TILE));
    for (int64_t head = 0; head < plan->key_heads; head++) {
      tasks.push_back(segment);
      tasks.back().key_head = head;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](auto &a, auto &b) { return a.cost() > b.cost(); });
  Room<float> deltas(tokens * plan->heads), part(rows * plan->heads * plan->size);
  Tensors<F> all = {q, k, v, grad, out, logs, grad_q, grad_k, grad_v, deltas.at, part.at};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * plan->heads; i++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t e = 0; e < plan->value_size; e++) sum += get(grad[i * plan->value_size + e]) * get(out[i * plan->value_size + e]);
      deltas.at[i] = sum;
    }
    Backward<F> my(*plan, longest);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) backward_segment<F>(my, *plan, all, tasks[i], starts, scale);
  }
  if (rows) sum_parts<F>(*plan, all, visits, starts, scale, threads);
}

}  // namespace

#define BACKWARD(F, X, letter)                                                                                                        \
  extern "C" void attention_backward_##letter(const X *grad, const X *q, const X *k, const X *v, const X *out, const float *logs,      \
                                              X *grad_q, X *grad_k, X *grad_v, const Plan *plan, float scale, int threads) {           \
    backward<F>(grad, q, k, v, out, logs, grad_q, grad_k, grad_v, plan, scale, threads);                                               \
  }

BACKWARD(Singles, float, f)
#ifdef HAS_PAIRS
BACKWARD(Pairs, bf16, b)
#endif
