// Causal attention inside documents, backward: a task is a segment of keys with all queries that see it. See attention.h.
//
// A task owns the gradients of its keys and values and writes a part of the queries' gradient; where several segments give to a query,
// the parts are summed afterwards in the order of the segments.

#ifdef __AVX512BF16__
#include "attention.h"

namespace {

const int64_t TILE = 64;      // keys whose probabilities and slopes are worked on at once
const int64_t SEGMENT = 512;  // keys of a task; measured in docs/log.md
const int64_t SEGMENTS = 16;  // of a document, at most, then they are longer: a query has a part of its gradient from each before it

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

struct Backward {  // what a thread needs for its backward tasks
  Room<pair> k, v, k_pairs, q, grad, q_pairs, grad_pairs, chances, slopes;
  Room<bf16> by_row;
  Room<float> grad_k, grad_v, grad_q;
  float logs[QUERIES], deltas[QUERIES];
  int64_t keys;
  Backward(const Plan &p, int64_t keys)
      : k(keys * p.size / 2), v(keys * p.value_size / 2), k_pairs(keys * p.size / 2), q(QUERIES * p.size / 2),
        grad(QUERIES * p.value_size / 2), q_pairs(QUERIES * p.size / 2), grad_pairs(QUERIES * p.value_size / 2),
        chances(QUERIES / 2 * TILE), slopes(QUERIES / 2 * TILE), by_row(QUERIES * keys), grad_k(keys * p.size),
        grad_v(keys * p.value_size), grad_q(ROWS * p.size), keys(keys) {}
};

struct Tensors {
  const void *q, *k, *v;
  const bf16 *grad, *out;
  const float *logs;
  bf16 *grad_q, *grad_k, *grad_v;
  float *deltas, *parts;
};

// Six rows of queries against keys [key, key + 16 * vectors): probabilities and the gradient of the scores, in pairs of rows and by row.
void backward_strip(Backward &my, const Plan &plan, float scale, int64_t row, int64_t position, int64_t key, int64_t column,
                           int64_t vectors, int64_t wide) {
  alignas(64) float scores[ROWS * TILE], grads[ROWS * TILE];
  int64_t half = plan.size / 2, width = plan.value_size / 2;
  products<ROWS, false>(my.q.at + row * half, half, 1, my.k.at + column * half, 16, half * 16, half, scores, TILE, vectors);
  products<ROWS, false>(my.grad.at + row * width, width, 1, my.v.at + column * width, 16, width * 16, width, grads, TILE, vectors);
  Whole whole(position, key, plan.window);
  const __m512i order = _mm512_add_epi32(_mm512_set1_epi32(0x00100000),
                                         _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                                                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  for (int r = 0; r < ROWS; r += 2) {
    pair *chances = my.chances.at + (row + r) / 2 * TILE, *slopes = my.slopes.at + (row + r) / 2 * TILE;
    bf16 *first = my.by_row.at + (row + r) * my.keys + column, *second = first + my.keys;
    __m512 log0 = _mm512_set1_ps(my.logs[row + r]), log1 = _mm512_set1_ps(my.logs[row + r + 1]), factor = _mm512_set1_ps(scale);
    __m512 delta0 = _mm512_set1_ps(my.deltas[row + r]), delta1 = _mm512_set1_ps(my.deltas[row + r + 1]);
    for (int64_t n = 0; n < vectors; n++) {
      const float *s = scores + r * TILE + n * 16, *g = grads + r * TILE + n * 16;
      __m512 p0 = power(_mm512_fmsub_ps(_mm512_load_ps(s), factor, log0));
      __m512 p1 = power(_mm512_fmsub_ps(_mm512_load_ps(s + TILE), factor, log1));
      __m512 d0 = _mm512_mul_ps(p0, _mm512_sub_ps(_mm512_load_ps(g), delta0));
      __m512 d1 = _mm512_mul_ps(p1, _mm512_sub_ps(_mm512_load_ps(g + TILE), delta1));
      if (!whole.has(n)) {
        __mmask16 see0 = seen(position + r, key + n * 16, plan.window), see1 = seen(position + r + 1, key + n * 16, plan.window);
        p0 = _mm512_maskz_mov_ps(see0, p0), d0 = _mm512_maskz_mov_ps(see0, d0);
        p1 = _mm512_maskz_mov_ps(see1, p1), d1 = _mm512_maskz_mov_ps(see1, d1);
      }
      __m512i p = (__m512i)_mm512_cvtne2ps_pbh(p1, p0), d = (__m512i)_mm512_cvtne2ps_pbh(d1, d0);
      _mm512_store_si512(chances + n * 16, _mm512_permutexvar_epi16(order, p));
      _mm512_store_si512(slopes + n * 16, _mm512_permutexvar_epi16(order, d));
      _mm256_store_si256((__m256i *)(first + n * 16), _mm512_castsi512_si256(d));
      _mm256_store_si256((__m256i *)(second + n * 16), _mm512_extracti64x4_epi64(d, 1));
    }
    if (vectors * 16 < wide) {  // six keys that begin in the rows' last vector may end in the next
      _mm512_store_si512(chances + vectors * 16, _mm512_setzero_si512());
      _mm512_store_si512(slopes + vectors * 16, _mm512_setzero_si512());
    }
  }
}

// to[keys][size] += a^T b for a in pairs of rows, TILE apart, and b in pairs of rows. No row before i + lead sees key i.
void transposed(const pair *a, const pair *b, int64_t from, int64_t stop, int64_t lead, int64_t keys, int64_t size, float *to) {
  for (int64_t key = 0; key < keys; key += ROWS) {
    int64_t first = std::max(from, (key + lead) / 2);
    auto some = key + ROWS <= keys ? products<ROWS, true> : key + 4 <= keys ? products<4, true> : products<2, true>;
    some(a + key + first * TILE, 1, TILE, b + first * size, size, 16, stop - first, to + key * size, size, size / 16);
  }
}

// The gradient of six rows of queries from a segment's keys: as it will stay where these are all keys, else as a part.
void query_strip(Backward &my, const Plan &plan, const Tensors &all, const Rows &grads, const Segment &segment, const Visit &visit,
                        int64_t head, int64_t row, int64_t position, int64_t stop, float scale) {
  int64_t size = plan.size, low = std::max<int64_t>(0, position - plan.window - (TILE - 2) - segment.first);
  int64_t from = up(low, TILE), to = up(std::min({position + ROWS, stop, segment.stop}) - segment.first, 16);
  const pair *slopes = (const pair *)(my.by_row.at + row * my.keys + from);
  products<ROWS, false>(slopes, my.keys / 2, 1, my.k_pairs.at + from / 2 * size, size, 16, (to - from) / 2, my.grad_q.at, size, size / 16);
  for (int64_t r = 0; r < ROWS && position + r < stop; r++) {
    const float *in = my.grad_q.at + r * size;
    if (visit.at >= 0) {
      memcpy(all.parts + ((visit.at + position + r - visit.first) * plan.heads + head) * size, in, size * sizeof(float));
      continue;
    }
    bf16 *out = (bf16 *)grads.at(position + r);
    for (int64_t i = 0; i < size; i += 16) put16(out + i, _mm512_mul_ps(_mm512_load_ps(in + i), _mm512_set1_ps(scale)));
  }
}

void backward_block(Backward &my, const Plan &plan, const Tensors &all, const Segment &segment, const Visit &visit, int64_t start,
                           int64_t head, int64_t first, int64_t stop, float scale) {
  int64_t size = plan.size, width = plan.value_size, rows = up(stop - first, ROWS), heads = plan.heads;
  Rows queries = rows_of(all.q, plan.q_step, head, size, plan, start), grads = rows_of(all.grad, heads * width, head, width, plan, start);
  Rows grad_q = rows_of(all.grad_q, heads * size, head, size, plan, start);
  for (int64_t r = 0; r < rows; r++) {
    bool there = first + r < stop;
    int64_t position = there ? first + r : first, token = position < plan.shared ? position : start + position - plan.shared;
    copy_row(queries.at(position), size, my.q.at + r * size / 2);
    copy_row(grads.at(position), width, my.grad.at + r * width / 2);
    my.logs[r] = there ? all.logs[token * heads + head] : -HIDDEN;  // a row beyond the last gets probabilities of zero
    my.deltas[r] = all.deltas[token * heads + head];
  }
  pack_pairs(queries, first, rows, stop, size, my.q_pairs.at);
  pack_pairs(grads, first, rows, stop, width, my.grad_pairs.at);
  for (int64_t key = segment.first; key < std::min(segment.stop, stop); key += TILE) {
    int64_t column = key - segment.first, wide = std::min(TILE, up(segment.stop - key, 16));
    int64_t from = std::max<int64_t>(0, key - first) / ROWS * ROWS, to = std::min(rows, up(key + TILE - 1 + plan.window - first, ROWS));
    if (to <= from) continue;
    for (int64_t r = from; r < to; r += ROWS) {
      int64_t vectors = std::min(wide, up(std::min(first + r + ROWS, stop) - key, 16)) / 16;
      backward_strip(my, plan, scale * LOG2E, r, first + r, key, column, vectors, wide);
    }
    transposed(my.chances.at, my.grad_pairs.at, from / 2, to / 2, key - first, wide, width, my.grad_v.at + column * width);
    transposed(my.slopes.at, my.q_pairs.at, from / 2, to / 2, key - first, wide, size, my.grad_k.at + column * size);
  }
  for (int64_t r = 0; r < rows; r += ROWS) query_strip(my, plan, all, grad_q, segment, visit, head, r, first + r, stop, scale);
}

void backward_segment(Backward &my, const Plan &plan, const Tensors &all, const Segment &segment, const std::vector<int64_t> &starts,
                             float scale) {
  int64_t size = plan.size, width = plan.value_size, keys = up(segment.stop - segment.first, 16), start = starts[segment.document];
  Rows k = rows_of(all.k, plan.k_step, segment.key_head, size, plan, start);
  Rows v = rows_of(all.v, plan.v_step, segment.key_head, width, plan, start);
  pack_rows(k, segment.first, keys, segment.stop, size, my.k.at);
  pack_rows(v, segment.first, keys, segment.stop, width, my.v.at);
  pack_pairs(k, segment.first, keys, segment.stop, size, my.k_pairs.at);
  std::fill_n(my.grad_k.at, keys * size, 0.0f);
  std::fill_n(my.grad_v.at, keys * width, 0.0f);
  for (const Visit &visit : *segment.visits) {
    int64_t count = visit.stop - visit.first, step = up(parts(count, parts(count, QUERIES)), ROWS);
    for (int64_t first = visit.first; first < visit.stop; first += step)
      for (int64_t head = segment.key_head * plan.group(); head < (segment.key_head + 1) * plan.group(); head++)
        backward_block(my, plan, all, segment, visit, starts[visit.document], head, first, std::min(first + step, visit.stop), scale);
  }
  Rows grad_k = rows_of(all.grad_k, plan.key_heads * size, segment.key_head, size, plan, start);
  Rows grad_v = rows_of(all.grad_v, plan.key_heads * width, segment.key_head, width, plan, start);
  for (int64_t key = segment.first; key < segment.stop; key++) {
    const float *of_k = my.grad_k.at + (key - segment.first) * size, *of_v = my.grad_v.at + (key - segment.first) * width;
    bf16 *to_k = (bf16 *)grad_k.at(key), *to_v = (bf16 *)grad_v.at(key);
    for (int64_t i = 0; i < size; i += 16) put16(to_k + i, _mm512_mul_ps(_mm512_load_ps(of_k + i), _mm512_set1_ps(scale)));
    for (int64_t i = 0; i < width; i += 16) put16(to_v + i, _mm512_load_ps(of_v + i));
  }
}

// Which queries see which keys: per segment its visits, in the order of the documents. Documents that one visit covers have no parts.
int64_t plan_visits(const Plan &plan, std::vector<Segment> &segments, std::vector<std::vector<Visit>> &visits) {
  auto cut = [&](int64_t document, int64_t first, int64_t stop) {
    int64_t count = std::min(SEGMENTS, parts(stop - first, SEGMENT)), step = count ? up(parts(stop - first, count), TILE) : 1;
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
void sum_parts(const Plan &plan, const Tensors &all, const std::vector<std::vector<Visit>> &visits, const std::vector<int64_t> &starts,
                      float scale, int threads) {
  int64_t row = plan.heads * plan.size;
  std::vector<std::vector<Visit>> by_document(plan.documents);
  for (auto &each : visits)
    for (const Visit &visit : each)
      if (visit.at >= 0) by_document[visit.document].push_back(visit);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t d = 0; d < plan.documents; d++)
    for (int64_t position = d ? plan.shared : 0; !by_document[d].empty() && position < plan.lengths[d]; position++) {
      int64_t token = position < plan.shared ? position : starts[d] + position - plan.shared;
      for (int64_t i = 0; i < row; i += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (const Visit &visit : by_document[d])
          if (visit.first <= position && position < visit.stop)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(all.parts + (visit.at + position - visit.first) * row + i));
        put16(all.grad_q + token * row + i, _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
      }
    }
}

}  // namespace

extern "C" void attention_backward_b(const bf16 *grad, const void *q, const void *k, const void *v, const bf16 *out, const float *logs,
                                     bf16 *grad_q, bf16 *grad_k, bf16 *grad_v, const Plan *plan, float scale, int threads) {
  std::vector<int64_t> starts = beginnings(*plan);
  std::vector<Segment> segments, tasks;
  std::vector<std::vector<Visit>> visits;
  int64_t rows = plan_visits(*plan, segments, visits), last = plan->documents - 1;
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
  Tensors all = {q, k, v, grad, out, logs, grad_q, grad_k, grad_v, deltas.at, part.at};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * plan->heads; i++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t e = 0; e < plan->value_size; e++) sum += get(grad[i * plan->value_size + e]) * get(out[i * plan->value_size + e]);
      deltas.at[i] = sum;
    }
    Backward my(*plan, longest);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) backward_segment(my, *plan, all, tasks[i], starts, scale);
  }
  if (rows) sum_parts(*plan, all, visits, starts, scale, threads);
}
#endif
