// A layer's reading maps as the tensor cores take them, and cosines and sines: what rebuilding takes, made once a call.
#pragma once

#include "minicache/head_matrix.cuh"
#include "minicache/key_rebuild.cuh"

namespace minicache {

// KeyRebuild's table: turns of a block's places, and of a whole block.
template <class T>
struct PlaceTurns {
  using E = Code<T>;
  const float* inverse_frequencies;
  char* out;

  // Of a place, by the lanes of a warp; those for places 0 and 1 also do a whole block's.
  MC_HD void fill(int dim, int, int place, int lane) const {
    auto* const row = reinterpret_cast<TurnPair<E>*>(out + place * KeyRebuild::turn_stride<E>(dim));
    auto* const steps = reinterpret_cast<KeyRebuild::Base*>(out + KeyRebuild::turn_bytes<E>(dim));
    MC_NO_UNROLL
    for (int pair = lane; pair < padded_half(dim) / 2; pair += kWarp) {
      row[pair] = KeyRebuild::turn_of<E>(dim, inverse_frequencies, place, pair);
      const int c = 2 * pair + place;
      if (place < 2) steps[c] = KeyRebuild::base_of(dim, inverse_frequencies, kBlockSize, c);
    }
  }
};

template <class T, class Turns>
struct MapFragmentsArguments {
  StreamShape shape;
  ReadMaps maps;
  std::int32_t tiles, steps;  // eights of columns; steps of [y | residual]
  bool paired;                // as `rebuild_fragment` says
  bool known;                 // components in the order of `known_component`
  bool neighbours;            // as `RowRebuild::component` says
  void* out;                  // [slots][rebuild_fragments]
  Turns turns;

  // `kind`: what is known of the stream.
  static MapFragmentsArguments of(const StreamReader& reader, int kind, bool neighbours, void* out,
                                  const Turns& turns) {
    const StreamShape& shape = reader.shape;
    return {shape,
            reader.maps,
            padded_half(shape.dim) / 4,
            rebuild_steps(shape),
            kind != kGeneral,
            is_known(kind),
            neighbours,
            out,
            turns};
  }
};
template <class T>
std::int64_t map_fragment_bytes(const StreamShape& shape) {
  return shape.heads * rebuild_fragments<T>(shape) * static_cast<std::int64_t>(sizeof(FragmentB<Code<T>>));
}

// What RowRebuild takes: [P | A]^T of every slot, null maps being the identity, components of y and residual in the
// order of `QueryFragments::component`, run by run; and tables of turns. Thread block: (slot, eight columns), behind
// the slots (table, four places); a warp for each step, or place.
template <class T, class Turns>
struct MapFragments {
  static constexpr int kThreads = kDecodeThreads;
  using E = Code<T>;
  using Arguments = MapFragmentsArguments<T, Turns>;

  static Grid grid(const Arguments& a, int tables) {
    return {a.shape.heads + tables, tables > 0 ? maximum(a.tiles, kBlockSize / kDecodeWarps) : a.tiles, 1};
  }

  template <class Block>
  MC_HD static void run(Block& block, const Arguments& a) {
    const int table = block.x() - a.shape.heads;
    block.each([&](Thread thread) {
      const int place = block.y() * kDecodeWarps + thread.warp();
      if (table < 0) {
        if (block.y() < a.tiles) fill(thread, a, block.x(), block.y());
      } else if (place < kBlockSize) {
        a.turns.fill(a.shape.dim, table, place, thread.lane());
      }
    });
  }

 private:
  // The run that a step of 16 components belongs to.
  struct Run {
    int first, length;
    MC_HD static Run of(const StreamShape& shape, int step) {
      if (16 * step >= shape.stored) return {shape.stored, shape.dim};
      int s = 0;
      auto holds = [&](const Segment& segment) {
        return segment.format != Format::drop && 16 * step - segment.stored < segment.length;
      };
      while (!holds(shape.segment[s])) ++s;
      return {shape.segment[s].stored, shape.segment[s].length};
    }
  };

  MC_HD static void fill(Thread thread, const Arguments& a, int slot, int tile) {
    const StreamShape& shape = a.shape;
    const int steps = padded_steps(a.steps), lane = thread.lane();
    const int d = RowRebuild::component(shape.dim, tile * 8 + lane / 4, a.neighbours);
    FragmentB<E>* const out = static_cast<FragmentB<E>*>(a.out) + std::int64_t{slot} * a.tiles * steps * kWarp;
    MC_NO_UNROLL
    for (int step = thread.warp(); step < steps; step += kDecodeWarps) {
      FragmentB<E>& target = out[rebuild_fragment(a.paired, steps, tile, step, lane)];
      const bool own = 16 * step < shape.stored;
      const HeadMatrix matrix = own ? HeadMatrix{a.maps.map, a.maps.map_heads, shape.stored}
                                    : HeadMatrix{a.maps.residual_map, shape.heads, shape.dim};
      const int before = own ? 0 : shape.stored;
      const bool unit = matrix.data == nullptr;
      const float* const row = unit || d < 0 ? nullptr : matrix.of(slot, shape.dim) + d * matrix.columns;
      const Run run = Run::of(shape, step);
      auto number = [&](int j, int i) {
        const int c = a.known ? known_component(run.length, step, lane, j, i)
                              : run.first + QueryFragments::component(run.length, step - run.first / 16, lane, j, i);
        if (d < 0 || step >= a.steps) return 0.0f;
        return unit ? static_cast<float>(c - before == d) : row[c - before];
      };
      MC_UNROLL
      for (int j = 0; j < 2; ++j) put_pair(target, j, make_pair<E>(number(j, 0), number(j, 1)));
    }
  }
};

}  // namespace minicache
