// Causal attention inside documents, in float32 and, where the processor multiplies pairs of it, in bfloat16; called by tiled.py.
//
// Forward keeps the result and one logarithm (base 2) of a sum per query and head; backward makes the scores again, tile by tile, as in
// FlashAttention-2 (Dao, 2023). Nothing above the diagonal is computed beyond one vector of keys, nothing is padded but rows to a multiple
// of 6. Every sum has one owner and a fixed order, so results are the same bits whatever the number of threads. Where all documents begin with
// the same `shared` tokens, these lie once before everything else, and a row of Rows finds them.

#pragma once

#include <vector>

#include "tiles.h"

namespace {

const int ROWS = 6;           // of a register tile: 6 * 4 vectors of sums leave 8 of 32 registers for operands, 6 * 2 leave 4 of 16
const int64_t QUERIES = 132;  // of a block, at most
const float HIDDEN = -__builtin_inff();  // 2^HIDDEN = 0
const float LOG2E = 1.44269504f;

// As tiled.py writes it.
struct Plan {
  int64_t q_step, k_step, v_step, heads, key_heads, size, value_size, window, shared, documents;
  int64_t lengths[1];
  int64_t group() const { return heads / key_heads; }
};

// Which of the keys from `key` on the query at `position` sees, a vector of them.
inline ints seen(int64_t position, int64_t key, int64_t window) {
  ints keys = numbers() + int32_t(key - position);
  return (keys <= 0) & (keys > -int32_t(window));
}

// Of the vectors of keys from `key` on: those in [low, high) are seen whole by all rows from `position` on.
struct Whole {
  int64_t low, high;
  Whole(int64_t position, int64_t key, int64_t window)
      : low(parts(std::max<int64_t>(0, position + ROWS - window - key), LANES)), high(std::max<int64_t>(0, position + 1 - key) / LANES) {}
  bool has(int64_t vector) const { return vector >= low && vector < high; }
};

template <class F>
Rows<F> rows_of(const Element<F> *base, int64_t step, int64_t head, int64_t size, const Plan &plan, int64_t start) {
  return {base + head * size, step, start, plan.shared};
}

// Where each document's own tokens begin.
inline std::vector<int64_t> beginnings(const Plan &plan) {
  std::vector<int64_t> starts(plan.documents, plan.shared);
  for (int64_t d = 1; d < plan.documents; d++) starts[d] = starts[d - 1] + plan.lengths[d - 1] - plan.shared;
  return starts;
}

}  // namespace
