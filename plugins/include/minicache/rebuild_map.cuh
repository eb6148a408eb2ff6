// The map that rebuilds a stream's rows, as fragments of products, and what is added to them.
//
//     x = (nu [y | residual]) [P | A]^T + c
//
// Halves of a vector (component i is paired with i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/stored_rows.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ((dim + 31) & ~31) >> 1; }

// Whether all of a tile's rows are in registers at once: two tiles share what is read of the map. Of other streams sums
// are, of all of a row's components.
MC_HD constexpr bool holds_rows(int kind) { return kind == kPlain || is_known(kind); }
// Cache blocks that are rebuilt together.
MC_HD constexpr int rebuilt_blocks(int kind) { return holds_rows(kind) ? 2 : 1; }

// Fragments B of [P | A]^T of one slot: where rows are held [padded vector / 8][padded steps / 2][lanes][2], otherwise
// [padded steps / 2][padded vector / 8][lanes][2].
template <class T>
MC_HD std::int64_t rebuild_fragments(const StreamShape& shape) {
  return static_cast<std::int64_t>(2 * padded_half(shape.dim) / 8) * padded_steps(rebuild_steps(shape)) * kWarp;
}
MC_HD int rebuild_fragment(bool held, int tiles, int steps, int tile, int step, int lane) {
  const int whole = step & ~1, before = held ? tile * steps + whole : whole * tiles + 2 * tile;
  return before * kWarp + 2 * lane + step % 2;
}

// Sums of a step of 16 components of half a vector, 0 and 1, and of those they are paired with, 2 and 3: a thread has
// columns 8 i + 2 t and the next one of sum i, t = lane % 4, of rows lane / 4 and lane / 4 + 8.
template <class Block, int Tiles>
using RebuiltStep = typename Block::template PerThread<FragmentD>[Tiles][4];

struct RebuildMap {
  const void* fragments;  // of the slot,
  std::int32_t shared;    // or where they lie in shared memory if they fit there; -1: they do not
  float* offset;          // c of the slot by two columns, each two twice: [padded half] fragments D
  std::int32_t rest;      // first step behind those of whole units of 32 components; where rows are not held

  static constexpr int kUsual = 128;  // components of a vector: there is code for as many

  // The component that column d of the fragments is of, -1 in the padding. `neighbours`: a thread's four columns of
  // either half are components 4 t to 4 t + 3 of the step.
  MC_HD static int component(int dim, int d, bool neighbours) {
    const int half = padded_half(dim), column = d % 16;
    const int place = neighbours ? 4 * (column % 8 / 2) + 2 * (column / 8) + column % 2 : column;
    const int c = d % half - column + place;
    return c < dim / 2 ? c + d / half * (dim / 2) : -1;
  }

  MC_HD static int whole_steps(const StreamReader& reader) {
    int steps = 0;
    MC_NO_UNROLL
    for (int i = 0; i < reader.part_count; ++i) steps += reader.runs[reader.parts[i]].length >> 5 << 1;
    return steps;
  }

  MC_HD static int offset_bytes(int dim) { return padded_half(dim) * static_cast<int>(sizeof(FragmentD)); }

  // Fills `offset`, without a `sync`.
  MC_HD void fill_offset(Thread thread, const StreamReader& reader, int slot, bool neighbours) const {
    const int dim = reader.shape.dim;
    const float* const constants = reader.maps.offset == nullptr ? nullptr : reader.maps.offset + slot * dim;
    for (int d = thread.index; d < 2 * padded_half(dim); d += kDecodeThreads) {
      const int c = component(dim, d, neighbours);
      float* const to = offset + d / 2 * 4 + d % 2;
      to[0] = to[2] = constants == nullptr || c < 0 ? 0.0f : constants[c];
    }
  }

  // Starts copying the slot's fragments to shared memory, if they are to lie there.
  template <class T, class Block>
  MC_HD void fetch(Block& block, const StreamReader& reader) const {
    if (shared >= 0) fetch_bytes(block, block.shared + shared, fragments, bytes<T>(reader));
  }

  // Of a slot's fragments.
  template <class T>
  MC_HD static int bytes(const StreamReader& reader) {
    return static_cast<int>(rebuild_fragments<T>(reader.shape) * sizeof(FragmentB<Code<T>>));
  }

  // Number of the eight columns that sum i of step n is of.
  MC_HD static int tile_of(int n, int half, int i) { return 2 * n + i / 2 * (half >> 3) + i % 2; }

  // c, to which the products with the map are added.
  template <int Kind, class Block>
  MC_HD void load_offset(Block& block, int n, int half, RebuiltStep<Block, 1>& c) const {
    // Numbers that are loaded, of which others are copies: what the compiler finds registers for.
    constexpr int N = is_known(Kind) && !(Kind == 64 && kArch == 1000) ? 2 : 4;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* const own = offset + 16 * tile_of(n, half, i) + 4 * (thread.lane() % 4);
        const auto x = detail::load<Neighbours<float, N>>(own);
        c[0][i](thread) = FragmentD{{x.x[0], x.x[1], x.x[N - 2], x.x[N - 1]}};
      }
    });
  }
};

}  // namespace minicache
