// Element-wise kernels of a decoder layer, each one pass over memory. native.py compiles them on the user's machine.
//
// Rows are independent, and each sum runs over one row (or a fixed chunk of rows) in a fixed order, so the number of threads does not
// change a bit. Numbers are stored as float32 or bfloat16 and computed in float32. A NaN stays a NaN. elementwise.py, blocks.py and loss.py
// hold the same operations in PyTorch, and the tests compare them.

#include "simd.h"

static inline float logistic(float x) { return 1.0f / (1.0f + exp_approx(-x)); }

// Value and derivative of an activation: 0 = SiLU, 1 = GELU in its tanh form.
static inline void gate(int kind, float x, float *value, float *slope) {
  if (kind == 0) {
    float s = logistic(x);
    *value = x * s;
    *slope = s * (1.0f + x * (1.0f - s));
  } else {
    float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    float t = 1.0f - 2.0f / (exp_approx(2.0f * inner) + 1.0f);
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
    for (int64_t i = 0; i < size; i++) sum += to_float(in[i]) * to_float(in[i]);
    float r = 1.0f / __builtin_sqrtf(sum / float(size) + eps);
    inverse[row] = r;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) assign(out + row * size + i, to_float(in[i]) * r * weight[i]);
  }
}

// `partial` is null or receives the weight's gradient, summed over each chunk of rows, [chunks, size]. `recomputed` is null or receives the
// output of the forward pass.
template <class X, class Y>
static void norm_backward(const Y *grad, const X *x, const float *weight, const float *inverse, X *grad_x, float *partial, Y *recomputed,
                          int64_t chunks, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    for (int64_t row = rows * chunk / chunks; row < rows * (chunk + 1) / chunks; row++) {
      const X *in = x + row * size;
      const Y *g = grad + row * size;
      float r = inverse[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; i++) sum += to_float(g[i]) * weight[i] * to_float(in[i]);
      float mean = sum * r * r / float(size);
      if (partial) {
        float *weight_grad = partial + chunk * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) weight_grad[i] += to_float(g[i]) * to_float(in[i]) * r;
      }
      if (recomputed) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) assign(recomputed + row * size + i, to_float(in[i]) * r * weight[i]);
      }
      if (grad_x) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) assign(grad_x + row * size + i, r * (to_float(g[i]) * weight[i] - to_float(in[i]) * mean));
      }
    }
}

template <int kind, class X>
static void gated_forward(const X *gate_up, X *out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const X *a = gate_up + row * 2 * size, *b = a + size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      float value, slope;
      gate(kind, to_float(a[i]), &value, &slope);
      assign(out + row * size + i, value * to_float(b[i]));
    }
  }
}

// `recomputed` is null or receives the output of the forward pass. It may be the memory of `grad`, and `grad_gate_up` that of `gate_up`.
template <int kind, class X>
static void gated_backward(const X *grad, const X *gate_up, X *grad_gate_up, X *recomputed, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const X *a = gate_up + row * 2 * size, *b = a + size, *g = grad + row * size;
    X *ga = grad_gate_up + row * 2 * size, *gb = ga + size, *out = recomputed ? recomputed + row * size : nullptr;
    if (out) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        float value, slope, g_i = to_float(g[i]), up_i = to_float(b[i]);
        gate(kind, to_float(a[i]), &value, &slope);
        assign(ga + i, g_i * up_i * slope);
        assign(gb + i, g_i * value);
        assign(out + i, value * up_i);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        float value, slope, g_i = to_float(g[i]), up_i = to_float(b[i]);
        gate(kind, to_float(a[i]), &value, &slope);
        assign(ga + i, g_i * up_i * slope);
        assign(gb + i, g_i * value);
      }
    }
  }
}

// Split the columns [queries | keys | values] of `all` into q, k and v, and rotate each pair (i, i + size/2) of the queries and keys by the
// angle of its token. With `inverse` it goes the other way: from q, k and v to `all`, rotating by the negative angle.
template <int inverse, class X, class A>
static void rotate(X *all, X *q, X *k, X *v, const A *cosine, const A *sine, int64_t tokens, int64_t queries, int64_t keys, int64_t size,
                   int threads) {
  int64_t half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < queries + 2 * keys; h++) {
      X *whole = all + (t * (queries + 2 * keys) + h) * size;
      X *part = h < queries ? q + (t * queries + h) * size : (h < queries + keys ? k : v) + (t * keys + (h - queries) % keys) * size;
      X *in = inverse ? part : whole, *out = inverse ? whole : part;
      if (h >= queries + keys) {
        memcpy(out, in, size * sizeof(X));
        continue;
      }
      const A *c = cosine + t * size, *s = sine + t * size;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        float s_signed = inverse ? -to_float(s[i]) : to_float(s[i]), x = to_float(in[i]), y = to_float(in[half + i]);
        assign(out + i, x * to_float(c[i]) - y * s_signed);
        assign(out + half + i, y * to_float(c[i]) + x * s_signed);
      }
    }
}

// Softmax of scale * scores in place. Query i = row % queries sees keys [first + i - window, first + i); all others get 0.
template <class X>
static void causal_softmax(X *scores, int64_t rows, int64_t keys, int64_t queries, int64_t first, int64_t window, float scale,
                           int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    X *line = scores + row * keys;
    int64_t stop = first + row % queries, start = stop - window > 0 ? stop - window : 0;
    float largest = -3.4e38f, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = start; i < stop; i++) largest = to_float(line[i]) > largest ? to_float(line[i]) : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; i++) sum += exp_approx((to_float(line[i]) - largest) * scale);
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t i = start; i < stop; i++) assign(line + i, exp_approx((to_float(line[i]) - largest) * scale) * inverse);
    memset(line, 0, start * sizeof(X));
    memset(line + stop, 0, (keys - stop) * sizeof(X));
  }
}

// Gradient of causal_softmax with respect to the scores, in place of the gradient of the probabilities.
template <class X>
static void softmax_backward(X *grad, const X *probabilities, int64_t rows, int64_t keys, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    X *g = grad + row * keys;
    const X *p = probabilities + row * keys;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < keys; i++) sum += to_float(g[i]) * to_float(p[i]);
#pragma omp simd
    for (int64_t i = 0; i < keys; i++) assign(g + i, scale * to_float(p[i]) * (to_float(g[i]) - sum));
  }
}

// Replace each row of logits by its gradient, softmax - one_hot(label), and write its loss, log sum exp - logit of the label.
template <class X>
static void cross_entropy(X *logits, const int64_t *labels, float *loss, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    X *line = logits + row * size;
    float largest = -3.4e38f, sum = 0.0f, target = to_float(line[labels[row]]);
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < size; i++) largest = to_float(line[i]) > largest ? to_float(line[i]) : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += exp_approx(to_float(line[i]) - largest);
    float log_sum = largest + __builtin_logf(sum), inverse = 1.0f / sum;
    loss[row] = log_sum - target;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) assign(line + i, exp_approx(to_float(line[i]) - largest) * inverse);
    assign(line + labels[row], exp_approx(target - largest) * inverse - 1.0f);
  }
}

// Exported functions carry the types of input and output: `_ff` float32, `_bb` bfloat16, `_fb` float32 in and bfloat16 out.
#define NORM(name, X, Y)                                                                                                         \
  extern "C" void norm_forward_##name(const X *x, const float *w, Y *out, float *inverse, int64_t rows, int64_t size, float eps, \
                                      int threads) {                                                                             \
    norm_forward(x, w, out, inverse, rows, size, eps, threads);                                                                  \
  }                                                                                                                              \
  extern "C" void norm_backward_##name(const Y *grad, const X *x, const float *w, const float *inverse, X *grad_x, float *part,  \
                                       Y *recomputed, int64_t chunks, int64_t rows, int64_t size, int threads) {                 \
    norm_backward(grad, x, w, inverse, grad_x, part, recomputed, chunks, rows, size, threads);                                   \
  }
NORM(ff, float, float)
NORM(bb, bf16, bf16)
NORM(fb, float, bf16)

// The second letter is the type of the angles.
#define ROTATE(name, X, A)                                                                                                       \
  extern "C" void rotate_##name(X *all, X *q, X *k, X *v, const A *c, const A *s, int64_t tokens, int64_t queries, int64_t keys, \
                                int64_t size, int inverse, int threads) {                                                        \
    inverse ? rotate<1>(all, q, k, v, c, s, tokens, queries, keys, size, threads)                                                \
            : rotate<0>(all, q, k, v, c, s, tokens, queries, keys, size, threads);                                               \
  }
ROTATE(ff, float, float)
ROTATE(bb, bf16, bf16)
ROTATE(bf, bf16, float)

#define FOR_TYPE(name, X)                                                                                                             \
  extern "C" void gated_forward_##name(const X *gate_up, X *out, int64_t rows, int64_t size, int kind, int threads) {                 \
    kind ? gated_forward<1>(gate_up, out, rows, size, threads) : gated_forward<0>(gate_up, out, rows, size, threads);                 \
  }                                                                                                                                   \
  extern "C" void gated_backward_##name(const X *grad, const X *gate_up, X *out, X *recomputed, int64_t rows, int64_t size, int kind, \
                                        int threads) {                                                                                \
    kind ? gated_backward<1>(grad, gate_up, out, recomputed, rows, size, threads)                                                     \
         : gated_backward<0>(grad, gate_up, out, recomputed, rows, size, threads);                                                    \
  }                                                                                                                                   \
  extern "C" void causal_softmax_##name(X *scores, int64_t rows, int64_t keys, int64_t queries, int64_t first, int64_t window,        \
                                        float scale, int threads) {                                                                   \
    causal_softmax(scores, rows, keys, queries, first, window, scale, threads);                                                       \
  }                                                                                                                                   \
  extern "C" void softmax_backward_##name(X *grad, const X *p, int64_t rows, int64_t keys, float scale, int threads) {                \
    softmax_backward(grad, p, rows, keys, scale, threads);                                                                            \
  }                                                                                                                                   \
  extern "C" void cross_entropy_##name(X *logits, const int64_t *labels, float *loss, int64_t rows, int64_t size, int threads) {      \
    cross_entropy(logits, labels, loss, rows, size, threads);                                                                         \
  }
FOR_TYPE(f, float)
FOR_TYPE(b, bf16)
