// Rotary embeddings of a block's keys by absolute position, undone before they are compressed.
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

// Component i is paired with i + D / 2; both turn back by position times frequency i: cosines and sines of a cache
// block's places.
struct Rotation {
  const float* table;  // [kBlockSize][D / 2 / kChunk][cosines, sines][kChunk]; null: no rotation
  int dim;

  MC_HD static std::int64_t numbers(int dim) { return std::int64_t{kBlockSize} * dim; }
  MC_HD bool turns() const { return table != nullptr; }
  // Where the cosines of a chunk of the first half at a row's position are, behind them the sines; a chunk of eight
  // never crosses the middle.
  MC_HD static int place(int dim, int row, int component) { return row * dim + 2 * component; }
  MC_HD Turn turn_of(int row, int component) const {
    const float* const own = table + place(dim, row, component);
    Turn turn;
    load_chunk(turn.cosine, own);
    load_chunk(turn.sine, own + kChunk);
    return turn;
  }
};

struct RotationArguments {
  const std::int32_t* block_index;   // of each block in its sequence
  const float* inverse_frequencies;  // [D / 2]
  std::int32_t dim;
  float* out;  // [blocks][Rotation::numbers]
};

// Rotations of cache blocks. Grid: blocks, 32 components of half a vector.
struct RotationKernel {
  static constexpr int kThreads = kTileThreads;
  static Grid grid(std::int32_t blocks, int dim) { return {blocks, ceil_div(dim / 2, kRowThreads * kChunk), 1}; }

  template <class Block>
  MC_HD static void run(Block& block, const RotationArguments& a) {
    block.each([&](Thread thread) {
      const int component = block.y() * kRowThreads * kChunk + component_of(thread, 0), row = row_of(thread);
      if (2 * component >= a.dim) return;
      const auto position = static_cast<float>(a.block_index[block.x()] * kBlockSize + row);
      float* const own = a.out + block.x() * Rotation::numbers(a.dim) + Rotation::place(a.dim, row, component);
      MC_NO_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        float sine;
        sine_and_cosine(multiply(position, a.inverse_frequencies[component + e]), sine, own[e]);
        own[kChunk + e] = -sine;
      }
    });
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
