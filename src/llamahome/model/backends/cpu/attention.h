// Causal attention inside documents for processors that multiply pairs of bfloat16 (AVX512_BF16); called by tiled.py.
//
// Forward keeps the result and one logarithm (base 2) of a sum per query and head; backward makes the scores again, tile by tile, as in
// FlashAttention-2 (Dao, 2023). Nothing above the diagonal is computed beyond 16 keys, nothing is padded but rows to a multiple of 6.
// Every sum has one owner and a fixed order, so results are the same bits whatever the number of threads. Where all documents begin with
// the same `shared` tokens, these lie once before everything else, and a row of Rows finds them.
//
// On machines without the instructions nothing of this is compiled, and blocks.py attends.

#pragma once

#include <vector>

#include "tiles.h"

namespace {

const int ROWS = 6;           // of a register tile: 6 * 4 vectors of sums leave 8 registers for operands
const int64_t QUERIES = 132;  // of a block, at most
const float HIDDEN = -__builtin_inff();  // 2^HIDDEN = 0
const float LOG2E = 1.44269504f;

// As tiled.py writes it.
struct Plan {
  int64_t q_step, k_step, v_step, heads, key_heads, size, value_size, window, shared, documents;
  int64_t lengths[1];
  int64_t group() const { return heads / key_heads; }
};

// Which of the 16 keys from `key` on the query at `position` sees.
inline __mmask16 seen(int64_t position, int64_t key, int64_t window) {
  const __m512i keys = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i last = _mm512_set1_epi32(int(position - key)), before = _mm512_set1_epi32(int(position - key - window));
  return _mm512_cmple_epi32_mask(keys, last) & _mm512_cmpgt_epi32_mask(keys, before);
}

// Of the vectors of 16 keys from `key` on: those in [low, high) are seen whole by all rows from `position` on.
struct Whole {
  int64_t low, high;
  Whole(int64_t position, int64_t key, int64_t window)
      : low(parts(std::max<int64_t>(0, position + ROWS - window - key), 16)), high(std::max<int64_t>(0, position + 1 - key) / 16) {}
  bool has(int64_t vector) const { return vector >= low && vector < high; }
};

inline Rows rows_of(const void *base, int64_t step, int64_t head, int64_t size, const Plan &plan, int64_t start) {
  return {(const bf16 *)base + head * size, step, start, plan.shared};
}

// Where each document's own tokens begin.
inline std::vector<int64_t> beginnings(const Plan &plan) {
  std::vector<int64_t> starts(plan.documents, plan.shared);
  for (int64_t d = 1; d < plan.documents; d++) starts[d] = starts[d - 1] + plan.lengths[d - 1] - plan.shared;
  return starts;
}

}  // namespace
