// Rotary embeddings of a block's keys by absolute position: undone before they are compressed, applied when restored.
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/tile.cuh"

namespace minicache {

// Whether a stream holds keys as they were before RoPE.
MC_HD bool turned(const StreamShape& shape) { return shape.part == Part::key && shape.basis == Basis::pre_rope; }

// Cosines and (signed) sines of a chunk's angles.
struct Turn {
  float cosine[kChunk], sine[kChunk];

  // Turns a chunk of the first half and the one it is paired with.
  MC_HD void apply(float (&first)[kChunk], float (&second)[kChunk]) const {
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      const float a = first[e], b = second[e];
      first[e] = a * cosine[e] - b * sine[e];
      second[e] = b * cosine[e] + a * sine[e];
    }
  }
};

// Component i is paired with i + D / 2; both turn by position times frequency i.
struct Rotation {
  const float* inverse_frequencies;  // [D / 2]; null: no rotation
  int dim;
  int position;     // of row 0
  float direction;  // 1: forward, -1: back

  MC_HD bool turns() const { return inverse_frequencies != nullptr; }
  // Of one component of the first half at a row's position.
  MC_HD void turn_of(int row, int component, float& sine, float& cosine) const {
    sine_and_cosine(multiply(static_cast<float>(position + row), inverse_frequencies[component]), sine, cosine);
    sine *= direction;
  }
  // Of a chunk of the first half; a chunk of eight never crosses the middle.
  MC_HD Turn turn_of(int row, int component) const {
    Turn turn;
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) turn_of(row, component + e, turn.sine[e], turn.cosine[e]);
    return turn;
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
    rotation.turn_of(row_of(thread), component).apply(first, second);
    store(first, component);
    store(second, component + half);
  }
}

}  // namespace minicache
