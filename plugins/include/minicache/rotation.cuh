// Rotary embeddings of a block's keys by absolute position: undone before they are compressed, applied when restored.
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/tile.cuh"

namespace minicache {

// Component i is paired with i + D / 2; both turn by position times frequency i.
struct Rotation {
  const float* inverse_frequencies;  // [D / 2]; null: no rotation
  int dim;
  int position;     // of row 0
  float direction;  // 1: forward, -1: back

  MC_HD bool turns() const { return inverse_frequencies != nullptr; }
  // First component of the chunk that a chunk is paired with. A chunk of eight never crosses the middle.
  MC_HD int partner(int component) const {
    return component < dim / 2 ? component + dim / 2 : component - dim / 2;
  }
  MC_HD void apply(float (&x)[kChunk], const float (&other)[kChunk], int row, int component) const {
    const bool second = component >= dim / 2;
    const float* frequency = inverse_frequencies + (second ? component - dim / 2 : component);
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      float sine, cosine;
      sine_and_cosine(multiply(static_cast<float>(position + row), frequency[e]), sine, cosine);
      const float side = second ? direction * sine : -direction * sine;
      x[e] = x[e] * cosine + other[e] * side;
    }
  }
};

}  // namespace minicache
