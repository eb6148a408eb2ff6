// Rotary embeddings of a block's keys by absolute position: undone before they are compressed, applied when restored.
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/tile.cuh"

namespace minicache {

// Whether a stream holds keys as they were before RoPE.
MC_HD bool turned(const StreamShape& shape) { return shape.part == Part::key && shape.basis == Basis::pre_rope; }

// Component i is paired with i + D / 2; both turn by position times frequency i.
struct Rotation {
  const float* inverse_frequencies;  // [D / 2]; null: no rotation
  int dim;
  int position;     // of row 0
  float direction;  // 1: forward, -1: back

  MC_HD bool turns() const { return inverse_frequencies != nullptr; }
  // Turns a chunk of the first half and the one it is paired with; a chunk of eight never crosses the middle.
  MC_HD void apply(float (&first)[kChunk], float (&second)[kChunk], int row, int component) const {
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      float sine, cosine;
      sine_and_cosine(multiply(static_cast<float>(position + row), inverse_frequencies[component + e]), sine, cosine);
      const float a = first[e], b = second[e];
      first[e] = a * cosine - b * (direction * sine);
      second[e] = b * cosine + a * (direction * sine);
    }
  }
};

// Calls `load(chunk, component)` for both chunks of each of a row's pairs, turns them and calls `store(chunk, component)`.
template <class Load, class Store>
MC_HD void turn_row(Thread thread, const Rotation& rotation, Load load, Store store) {
  const int half = rotation.dim / 2;
  MC_NO_UNROLL
  for (int component = component_of(thread, 0); component < half; component += kRowThreads * kChunk) {
    float first[kChunk], second[kChunk];
    load(first, component);
    load(second, component + half);
    rotation.apply(first, second, row_of(thread), component);
    store(first, component);
    store(second, component + half);
  }
}

}  // namespace minicache
