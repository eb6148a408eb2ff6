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
  bool held;                  // as `rebuild_fragment` says
  bool known;                 // components in the order of `known_component`
  bool neighbours;            // as `RebuildMap::component` says
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
            holds_rows(kind),
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

// What RebuildMap takes: [P | A]^T of every slot, null maps being the identity, components of y and residual in the
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
  // The run that a step of the map belongs to, and which of the run's it is. Unless rows are held, whole units of 32
  // components of all runs come first, behind them what is left of each.
  struct Run {
    int first, length, step;  // first: among stored components; the residual's follow the others

    MC_HD static Run of(const StreamShape& shape, bool held, int step) {
      const int runs = shape.segments + (shape.has_residual() ? 1 : 0);
      auto run = [&](int n) -> Run {
        if (n == shape.segments) return {shape.stored, shape.dim, 0};
        const Segment& segment = shape.segment[n];
        return {segment.stored, segment.format == Format::drop ? 0 : segment.length, 0};
      };
      for (const bool whole : {true, false}) {
        for (int n = 0; n < runs; ++n) {
          const Run own = run(n);
          const int all = own.length / 16, units = held ? all : all & ~1, steps = whole ? units : all - units;
          if (step < steps) return {own.first, own.length, whole ? step : units + step};
          step -= steps;
        }
      }
      return {0, 0, 0};  // padding
    }
  };

  MC_HD static void fill(Thread thread, const Arguments& a, int slot, int tile) {
    const StreamShape& shape = a.shape;
    const int steps = padded_steps(a.steps), lane = thread.lane();
    const int d = RebuildMap::component(shape.dim, tile * 8 + lane / 4, a.neighbours);
    FragmentB<E>* const out = static_cast<FragmentB<E>*>(a.out) + std::int64_t{slot} * a.tiles * steps * kWarp;
    MC_NO_UNROLL
    for (int step = thread.warp(); step < steps; step += kDecodeWarps) {
      FragmentB<E>& target = out[rebuild_fragment(a.held, a.tiles, steps, tile, step, lane)];
      const Run run = Run::of(shape, a.held, step);
      const bool own = run.first < shape.stored;
      const HeadMatrix matrix = own ? HeadMatrix{a.maps.map, a.maps.map_heads, shape.stored}
                                    : HeadMatrix{a.maps.residual_map, shape.heads, shape.dim};
      const int before = own ? 0 : shape.stored;
      const bool unit = matrix.data == nullptr;
      const float* const row = unit || d < 0 ? nullptr : matrix.of(slot, shape.dim) + d * matrix.columns;
      auto number = [&](int j, int i) {
        const int c = a.known ? known_component(run.length, run.step, lane, j, i)
                              : run.first + QueryFragments::component(run.length, run.step, lane, j, i);
        if (d < 0 || run.length == 0) return 0.0f;
        return unit ? static_cast<float>(c - before == d) : row[c - before];
      };
      MC_UNROLL
      for (int j = 0; j < 2; ++j) put_pair(target, j, make_pair<E>(number(j, 0), number(j, 1)));
    }
  }
};

}  // namespace minicache
