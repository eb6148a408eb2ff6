// Tokens a block keeps exactly: which ones, and how they are stored.
#pragma once

#include "minicache/quantize.cuh"

namespace minicache {

// Shared memory of retention.
struct RetentionScratch {
  float* score;          // [B], kFirstScore where a distance has no meaning
  float* rank;           // [B]
  std::int32_t* kept;    // [B]: 1 if retained
  std::int32_t* index;   // [B / 2]: offsets, ascending, then -1
};

// What a token is ranked by: larger first, -infinity if its rule does not keep it.
MC_HD float retention_rank(const StreamShape& shape, const float* scores, int token, bool sinks) {
  if (sinks && token < shape.sink_tokens) return kInfinity;
  const float score = scores[token];
  if (shape.retention == Retention::topk) return score;
  // Relative errors are always meaningful; angles are where they are below the score of those that are not.
  const float limit = shape.merge == Merge::linear ? kInfinity : kFirstScore;
  float high = -kInfinity, low = kInfinity;
  for (int i = 0; i < kBlockSize; ++i) {
    if (!(scores[i] < limit)) continue;
    high = maximum(high, scores[i]);
    low = minimum(low, scores[i]);
  }
  const bool meaningful = score < limit;
  const float share = multiply(add(high, -low), shape.gamma);
  if (shape.retention == Retention::threshold) return !meaningful || score > add(high, -share) ? score : -kInfinity;
  return meaningful && score < add(low, share) ? -score : -kInfinity;
}

// Fills `kept` and `index` from `score`, all of them synchronized; `sinks`: this is a sequence's first block.
template <class Block>
MC_HD void choose_retained(Block& block, const StreamShape& shape, const RetentionScratch& s, bool sinks) {
  block.each([&](Thread thread) {
    if (thread.index < kBlockSize) s.rank[thread.index] = retention_rank(shape, s.score, thread.index, sinks);
    if (thread.index < kBlockSize / 2) s.index[thread.index] = -1;
  });
  block.sync();
  block.each([&](Thread thread) {
    const int token = thread.index;
    if (token >= kBlockSize) return;
    const float own = s.rank[token];
    int before = 0;  // ties go to the lower position
    for (int i = 0; i < kBlockSize; ++i) before += s.rank[i] > own || (s.rank[i] == own && i < token);
    s.kept[token] = own > -kInfinity && before < shape.retained;
  });
  block.sync();
  block.each([&](Thread thread) {
    const int token = thread.index;
    if (token >= kBlockSize || !s.kept[token]) return;
    int place = 0;
    for (int i = 0; i < token; ++i) place += s.kept[i];
    s.index[place] = token;
  });
  block.sync();
}

// Retained vectors of every member, from its rows in the full tier (`rows(member)`, [B, D] as they are); unused slots
// are zero.
template <class T, class Block, class Rows>
MC_HD void store_exact(Block& block, const StreamBlock& to, int head, const std::int32_t* index, Rows rows) {
  const StreamShape& shape = to.shape;
  const int count = shape.members * shape.retained, dim = shape.dim;
  for (int start = 0; start < count; start += kBlockSize) {
    const auto load = [&](float(&x)[kChunk], int row, int component) {
      const int vector = start + row, token = vector < count ? index[vector % shape.retained] : -1;
      if (token >= 0) {
        load_chunk(x, rows(vector / shape.retained) + token * dim + component);
      } else {
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) x[e] = 0.0f;
      }
    };
    if (shape.retained_format != Format::model) {
      quantize_rows(block, dim, shape.retained_format, load, [&](int row) {
        const int vector = start + row, member = vector / shape.retained, slot = vector % shape.retained;
        if (vector >= count) return RowTarget{nullptr, nullptr, nullptr};
        Half* params = to.exact_params(member, head) + slot;
        return RowTarget{to.exact_codes(member, head) + slot * shape.exact_bytes(), params,
                         is_integer(shape.retained_format) ? params + shape.retained : nullptr};
      });
      continue;
    }
    block.each([&](Thread thread) {
      const int vector = start + row_of(thread);
      if (vector >= count) return;
      T* exact = to.exact<T>(vector / shape.retained, head) + vector % shape.retained * dim;
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < dim; component += kRowThreads * kChunk) {
        float x[kChunk];
        load(x, row_of(thread), component);
        store_chunk(exact + component, x);
      }
    });
  }
}

}  // namespace minicache
