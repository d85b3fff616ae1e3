// Causal attention inside documents, in float32 and, with AVX512_BF16, in bfloat16. Called by tiled.py.
//
// The forward pass stores its result and, per query and head, the base-2 logarithm of the softmax sum. The backward pass recomputes the
// scores tile by tile, as in FlashAttention-2 (Dao, 2023). At most one vector of keys is computed beyond the diagonal, and rows are padded
// to a multiple of 6. Each sum is computed by one thread in a fixed order, so the number of threads does not change a bit. If all documents
// begin with the same `shared` tokens, the pass holds these tokens once, before the documents' own tokens.

#pragma once

#include <vector>

#include "tiles.h"

namespace {

const int TILE_ROWS = 6;          // of a register tile: 6 * 4 vectors of sums leave 8 of 32 registers for operands, 6 * 2 leave 4 of 16
const int64_t QUERY_BLOCK = 132;  // maximum number of queries in a block
const float MINUS_INFINITY = -__builtin_inff();  // score of a key that a query may not see
const float LOG2E = 1.44269504f;

// The arguments, as tiled.py writes them: strides in numbers, sizes, the window in tokens, and the length of each document.
struct Plan {
  int64_t q_stride, k_stride, v_stride, heads, key_heads, head_size, value_size, window, shared, documents;
  int64_t lengths[1];
  int64_t group() const { return heads / key_heads; }
};

// Mask of the LANES keys from `key` on that the query at `position` may see.
inline IntVec visible(int64_t position, int64_t key, int64_t window) {
  IntVec keys = lane_indices() + int32_t(key - position);
  return (keys <= 0) & (keys > -int32_t(window));
}

// The vectors of keys, counted from `key`, whose keys are all visible to all TILE_ROWS queries from `position` on: [low, high).
struct VisibleToAll {
  int64_t low, high;
  VisibleToAll(int64_t position, int64_t key, int64_t window)
      : low(ceil_div(std::max<int64_t>(0, position + TILE_ROWS - window - key), LANES)),
        high(std::max<int64_t>(0, position + 1 - key) / LANES) {}
  bool contains(int64_t vector) const { return vector >= low && vector < high; }
};

template <class F>
HeadRows<F> head_rows(const Element<F> *base, int64_t stride, int64_t head, int64_t head_size, const Plan &plan, int64_t start) {
  return {base + head * head_size, stride, start, plan.shared};
}

// The first token of each document after the shared ones.
inline std::vector<int64_t> document_starts(const Plan &plan) {
  std::vector<int64_t> starts(plan.documents, plan.shared);
  for (int64_t d = 1; d < plan.documents; d++) starts[d] = starts[d - 1] + plan.lengths[d - 1] - plan.shared;
  return starts;
}

}  // namespace
