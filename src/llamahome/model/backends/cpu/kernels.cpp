// Element-wise work of a decoder layer in one pass over memory each; compiled on the user's machine by native.py.
//
// Rows are independent and every sum runs over one row (or a fixed chunk of rows) in a fixed order, so results are the same bits
// whatever the number of threads. Numbers travel as float32 or bfloat16 and are worked on as float32; a NaN stays a NaN.
// The plain PyTorch words for each of these are in elementwise.py and blocks.py; tests hold the two together.

#include "numbers.h"

static inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Value and slope of the two gates: 0 = SiLU, 1 = GELU in its tanh form.
static inline void gate(int kind, float x, float *value, float *slope) {
  if (kind == 0) {
    float s = logistic(x);
    *value = x * s;
    *slope = s * (1.0f + x * (1.0f - s));
  } else {
    float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    float t = 1.0f - 2.0f / (exponential(2.0f * inner) + 1.0f);
    *value = 0.5f * x * (1.0f + t);
    *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 0.134145f * x * x);
  }
}

template <class X, class Y>
static void norm_forward(const X *x, const float *weight, Y *out, float *inverse, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const X *in = x + row * size;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += get(in[i]) * get(in[i]);
    float r = 1.0f / __builtin_sqrtf(sum / float(size) + eps);
    inverse[row] = r;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) put(out + row * size + i, get(in[i]) * r * weight[i]);
  }
}

// `partial` is null or [chunks, size]: the weight's gradient, summed over fixed chunks of rows. `again` is null or gets what the forward
// pass gave.
template <class X, class Y>
static void norm_backward(const Y *grad, const X *x, const float *weight, const float *inverse, X *grad_x, float *partial,
                          Y *again, int64_t chunks, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
      const X *in = x + row * size;
      const Y *g = grad + row * size;
      float r = inverse[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; i++) sum += get(g[i]) * weight[i] * get(in[i]);
      float mean = sum * r * r / float(size);
      if (partial) {
        float *own = partial + chunk * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) own[i] += get(g[i]) * get(in[i]) * r;
      }
      if (again) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) put(again + row * size + i, get(in[i]) * r * weight[i]);
      }
      if (grad_x) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) put(grad_x + row * size + i, r * (get(g[i]) * weight[i] - get(in[i]) * mean));
      }
    }
}

template <int kind, class X>
static void gated_forward(const X *both, X *out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const X *a = both + row * 2 * size, *b = a + size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      float value, slope;
      gate(kind, get(a[i]), &value, &slope);
      put(out + row * size + i, value * get(b[i]));
    }
  }
}

// `again` is null or gets what the forward pass gave; it may lie where `grad` does, and `grad_both` where `both` does.
template <int kind, class X>
static void gated_backward(const X *grad, const X *both, X *grad_both, X *again, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const X *a = both + row * 2 * size, *b = a + size, *g = grad + row * size;
    X *ga = grad_both + row * 2 * size, *gb = ga + size, *out = again ? again + row * size : nullptr;
    if (out) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        float value, slope, up = get(g[i]), other = get(b[i]);
        gate(kind, get(a[i]), &value, &slope);
        put(ga + i, up * other * slope);
        put(gb + i, up * value);
        put(out + i, value * other);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        float value, slope, up = get(g[i]), other = get(b[i]);
        gate(kind, get(a[i]), &value, &slope);
        put(ga + i, up * other * slope);
        put(gb + i, up * value);
      }
    }
  }
}

// The heads of a token lie side by side in `all`, queries, keys, values, and apart in q, k and v. Every pair (i, i + size/2) of a query or
// key is rotated by its token's angle on the way; `back` goes from q, k and v to `all` and turns the other way.
template <int back, class X, class A>
static void rotate(X *all, X *q, X *k, X *v, const A *cosine, const A *sine, int64_t tokens, int64_t queries, int64_t keys, int64_t size,
                   int threads) {
  int64_t half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < queries + 2 * keys; h++) {
      X *whole = all + (t * (queries + 2 * keys) + h) * size;
      X *part = h < queries ? q + (t * queries + h) * size : (h < queries + keys ? k : v) + (t * keys + (h - queries) % keys) * size;
      X *in = back ? part : whole, *out = back ? whole : part;
      if (h >= queries + keys) {
        memcpy(out, in, size * sizeof(X));
        continue;
      }
      const A *c = cosine + t * size, *s = sine + t * size;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        float turned = back ? -get(s[i]) : get(s[i]), x = get(in[i]), y = get(in[half + i]);
        put(out + i, x * get(c[i]) - y * turned);
        put(out + half + i, y * get(c[i]) + x * turned);
      }
    }
}

// Softmax of scale * scores in place; query (row % wide) sees keys [first + row % wide - window, first + row % wide), others get 0.
template <class X>
static void causal_softmax(X *scores, int64_t rows, int64_t keys, int64_t wide, int64_t first, int64_t window, float scale,
                           int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    X *line = scores + row * keys;
    int64_t stop = first + row % wide, start = stop - window > 0 ? stop - window : 0;
    float top = -3.4e38f, sum = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t i = start; i < stop; i++) top = get(line[i]) > top ? get(line[i]) : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; i++) sum += exponential((get(line[i]) - top) * scale);
    float share = 1.0f / sum;
#pragma omp simd
    for (int64_t i = start; i < stop; i++) put(line + i, exponential((get(line[i]) - top) * scale) * share);
    memset(line, 0, start * sizeof(X));
    memset(line + stop, 0, (keys - stop) * sizeof(X));
  }
}

// Gradient of the above with respect to the scores, in place of the gradient of the probabilities.
template <class X>
static void softmax_backward(X *grad, const X *chances, int64_t rows, int64_t keys, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    X *g = grad + row * keys;
    const X *p = chances + row * keys;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < keys; i++) sum += get(g[i]) * get(p[i]);
#pragma omp simd
    for (int64_t i = 0; i < keys; i++) put(g + i, scale * get(p[i]) * (get(g[i]) - sum));
  }
}

// One row of logits becomes its gradient (softmax - target); `loss` gets log sum exp - logit of the target.
template <class X>
static void cross_entropy(X *logits, const int64_t *labels, float *loss, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    X *line = logits + row * size;
    float top = -3.4e38f, sum = 0.0f, wanted = get(line[labels[row]]);
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; i++) top = get(line[i]) > top ? get(line[i]) : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += exponential(get(line[i]) - top);
    float log_sum = top + __builtin_logf(sum), share = 1.0f / sum;
    loss[row] = log_sum - wanted;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) put(line + i, exponential(get(line[i]) - top) * share);
    put(line + labels[row], exponential(wanted - top) * share - 1.0f);
  }
}

// One entry per combination of types: `_ff` float in and out, `_bb` bfloat16, `_fb` float in and bfloat16 out.
#define NORM(name, X, Y)                                                                                                         \
  extern "C" void norm_forward_##name(const X *x, const float *w, Y *out, float *inverse, int64_t rows, int64_t size, float eps, \
                                      int threads) {                                                                             \
    norm_forward(x, w, out, inverse, rows, size, eps, threads);                                                                  \
  }                                                                                                                              \
  extern "C" void norm_backward_##name(const Y *grad, const X *x, const float *w, const float *inverse, X *grad_x, float *part,  \
                                       Y *again, int64_t chunks, int64_t rows, int64_t size, int threads) {                      \
    norm_backward(grad, x, w, inverse, grad_x, part, again, chunks, rows, size, threads);                                        \
  }
NORM(ff, float, float)
NORM(bb, bf16, bf16)
NORM(fb, float, bf16)

// The letter of the angles comes second.
#define ROTATE(name, X, A)                                                                                                       \
  extern "C" void rotate_##name(X *all, X *q, X *k, X *v, const A *c, const A *s, int64_t tokens, int64_t queries, int64_t keys,   \
                                int64_t size, int back, int threads) {                                                           \
    back ? rotate<1>(all, q, k, v, c, s, tokens, queries, keys, size, threads)                                                    \
         : rotate<0>(all, q, k, v, c, s, tokens, queries, keys, size, threads);                                                   \
  }
ROTATE(ff, float, float)
ROTATE(bb, bf16, bf16)
ROTATE(bf, bf16, float)

#define EACH(name, X)                                                                                                            \
  extern "C" void gated_forward_##name(const X *both, X *out, int64_t rows, int64_t size, int kind, int threads) {               \
    kind ? gated_forward<1>(both, out, rows, size, threads) : gated_forward<0>(both, out, rows, size, threads);                  \
  }                                                                                                                              \
  extern "C" void gated_backward_##name(const X *grad, const X *both, X *out, X *again, int64_t rows, int64_t size, int kind,    \
                                        int threads) {                                                                           \
    kind ? gated_backward<1>(grad, both, out, again, rows, size, threads)                                                        \
         : gated_backward<0>(grad, both, out, again, rows, size, threads);                                                       \
  }                                                                                                                              \
  extern "C" void causal_softmax_##name(X *scores, int64_t rows, int64_t keys, int64_t wide, int64_t first, int64_t window,      \
                                        float scale, int threads) {                                                              \
    causal_softmax(scores, rows, keys, wide, first, window, scale, threads);                                                     \
  }                                                                                                                              \
  extern "C" void softmax_backward_##name(X *grad, const X *p, int64_t rows, int64_t keys, float scale, int threads) {           \
    softmax_backward(grad, p, rows, keys, scale, threads);                                                                       \
  }                                                                                                                              \
  extern "C" void cross_entropy_##name(X *logits, const int64_t *labels, float *loss, int64_t rows, int64_t size, int threads) { \
    cross_entropy(logits, labels, loss, rows, size, threads);                                                                    \
  }
EACH(f, float)
EACH(b, bf16)
