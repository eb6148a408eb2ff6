// A stream's rows as vectors: a warp rebuilds 16 of a cache block's on the tensor cores,
//
//     x = (nu [y | residual]) [P | A]^T + c
//
// Rows at the same places of two blocks share what is read of the map. Halves of a vector (component i is paired with
// i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/stored_rows.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ((dim + 31) & ~31) >> 1; }

// Fragments B of [P | A]^T of one slot: [padded vector / 8][padded steps][lanes], or, of streams that are not general
// (`paired`), [padded vector / 8][padded steps / 2][lanes][2].
template <class T>
MC_HD std::int64_t rebuild_fragments(const StreamShape& shape) {
  return static_cast<std::int64_t>(2 * padded_half(shape.dim) / 8) * padded_steps(rebuild_steps(shape)) * kWarp;
}
MC_HD int rebuild_fragment(bool paired, int steps, int tile, int step, int lane) {
  if (!paired) return (tile * steps + step) * kWarp + lane;
  return ((tile * steps + (step & ~1)) * kWarp + 2 * lane) + step % 2;
}

constexpr int kPlainSteps = 32 * kDecodeWarps / 16;  // of a plain stream, at most
constexpr int kRebuildBlocks = 2;  // cache blocks that are rebuilt together, unless a stream is general

// Sums of a step of 16 components of half a vector, 0 and 1, and of those they are paired with, 2 and 3: a thread has
// columns 8 i + 2 t and the next one of sum i, t = lane % 4, of rows lane / 4 and lane / 4 + 8.
template <class Block, int Tiles>
using RebuiltStep = typename Block::template PerThread<FragmentD>[Tiles][4];

struct RowRebuild {
  const void* map;             // fragments,
  std::int32_t map_in_shared;  // or where they lie in shared memory if they fit there; -1: they do not
  StoredRows rows;             // of streams that are not known
  float* offset;               // c of the slot by column, [2 padded halves]

  // The component that column d of the fragments is of, -1 in the padding. `neighbours`: a thread's four columns of
  // either half are components 4 t to 4 t + 3 of the step.
  MC_HD static int component(int dim, int d, bool neighbours) {
    const int half = padded_half(dim), column = d % 16;
    const int place = neighbours ? 4 * (column % 8 / 2) + 2 * (column / 8) + column % 2 : column;
    const int c = d % half - column + place;
    return c < dim / 2 ? c + d / half * (dim / 2) : -1;
  }

  // `fragments`: of all slots; `shared`: where things lie in a thread block's shared memory.
  template <class T, int Kind, class Block, class Shared>
  MC_HD static RowRebuild of(const Block& block, const StreamReader& reader, const void* fragments, int slot,
                             const Shared& shared) {
    RowRebuild rebuild{};
    rebuild.map = static_cast<const char*>(fragments) + static_cast<std::int64_t>(slot) * map_bytes<T>(reader);
    rebuild.map_in_shared = shared.map_in_shared ? shared.map : -1;
    if (!is_known(Kind)) rebuild.rows = {block.shared + shared.rows, rebuild_steps(reader.shape)};
    rebuild.offset = reinterpret_cast<float*>(block.shared + shared.offset);
    return rebuild;
  }

  // Fills `offset` and the padding of the rows, without a `sync`.
  template <class T, int Kind, class Block>
  MC_HD void prepare(Block& block, const StreamReader& reader, int slot, bool neighbours) const {
    const int dim = reader.shape.dim;
    const float* const constants = reader.maps.offset == nullptr ? nullptr : reader.maps.offset + slot * dim;
    block.each([&](Thread thread) {
      if (!is_known(Kind)) rows.template pad<Code<T>>(thread);
      for (int d = thread.index; d < 2 * padded_half(dim); d += kDecodeThreads) {
        const int c = component(dim, d, neighbours);
        offset[d] = constants == nullptr || c < 0 ? 0.0f : constants[c];
      }
    });
  }

  // Starts copying the slot's fragments to shared memory, if they are to lie there.
  template <class T, class Block>
  MC_HD void fetch_map(Block& block, const StreamReader& reader) const {
    if (map_in_shared >= 0) fetch_bytes(block, block.shared + map_in_shared, map, map_bytes<T>(reader));
  }

  // Calls `add(half, n, sums)` for each step n of half a vector: of the warp's 16 rows of each of `stages`. `half`: of
  // the padded vector, a number; `Fixed` only if that is half of `dim`.
  template <class T, int Kind, class Formats, int Tiles, class Block, class F>
  MC_HD void each_step(Block& block, const KeyStage<Kind, Formats> (&stages)[Tiles], F add) const {
    using E = Code<T>;
    const int dim = stages[0].reader.shape.dim;
    if constexpr (is_known(Kind)) {
      Rows<E, Block, Tiles> y[Kind / 16];
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        read_rows<T>(block, stages[m], [&](Thread thread, int step) -> FragmentA<E>& { return y[step][m](thread); });
      }
      rebuild_plain<E, Kind / 16, Tiles>(block, dim, Fixed<Kind / 16>{}, y, add);
    } else if constexpr (Kind == kPlain) {
      const int steps = padded_steps(rows.steps);
      Rows<E, Block, Tiles> y[kPlainSteps];
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        rows.template store<T>(block, stages[m]);
        block.each([&](Thread thread) {
          MC_UNROLL
          for (int step = 0; step < kPlainSteps; ++step) {
            if (step >= steps) break;
            y[step][m](thread) = rows.template row<E>(thread, step);
          }
        });
      }
      rebuild_plain<E, kPlainSteps, Tiles>(block, dim, steps, y, add);
    } else {
      static_assert(Tiles == 1, "there is room for the rows of one tile");
      rows.template store<T>(block, stages[0]);
      rebuild_any<E>(block, padded_half(dim), rows.steps, add);
    }
  }

 private:
  template <class T>
  MC_HD static int map_bytes(const StreamReader& reader) {
    return static_cast<int>(rebuild_fragments<T>(reader.shape) * sizeof(FragmentB<Code<T>>));
  }

  template <class E, class Block, int Tiles>
  using Rows = typename Block::template PerThread<FragmentA<E>>[Tiles];

  // Number of the eight columns that sum i of step n is of.
  MC_HD static int tile_of(int n, int half, int i) { return 2 * n + i / 2 * (half >> 3) + i % 2; }

  // c, to which the products with the map are added.
  template <class Block>
  MC_HD void load_offset(Block& block, int n, int half, RebuiltStep<Block, 1>& c) const {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const auto x = detail::load<Neighbours<float, 2>>(offset + 8 * tile_of(n, half, i) + 2 * (thread.lane() % 4));
        c[0][i](thread) = FragmentD{{x.x[0], x.x[1], x.x[0], x.x[1]}};
      }
    });
  }

  // `steps`: an even number, at most Most.
  template <class E, int Most, int Tiles, class Block, class Half, class Steps, class F>
  MC_HD void rebuild_step(Block& block, Half half, int n, Steps steps, const FragmentPair<E>* map,
                          const Rows<E, Block, Tiles> (&y)[Most], F add) const {
    RebuiltStep<Block, 1> c;
    RebuiltStep<Block, Tiles> sum;
    load_offset(block, n, half, c);
    MC_UNROLL
    for (int step = 0; step < Most; step += 2) {
      if (step >= steps) break;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int place = rebuild_fragment(true, steps, tile_of(n, half, i), step, 0) / 2;
        typename Block::template PerThread<FragmentB<E>> part[2];
        block.each([&](Thread thread) {
          const FragmentPair<E> both = map[place + thread.lane()];
          part[0](thread) = both.step[0];
          part[1](thread) = both.step[1];
        });
        MC_UNROLL
        for (int m = 0; m < Tiles; ++m)
          block.multiply_add(sum[m][i], y[step][m], part[0], step == 0 ? c[0][i] : sum[m][i]);
        MC_UNROLL
        for (int m = 0; m < Tiles; ++m) block.multiply_add(sum[m][i], y[step + 1][m], part[1]);
      }
    }
    add(half, n, sum);
  }

  template <class E, int Most, int Tiles, class Block, class Steps, class F>
  MC_HD void rebuild_plain(Block& block, int dim, Steps steps, const Rows<E, Block, Tiles> (&y)[Most], F add) const {
    // Twice, so that the compiler knows which memory it is; and once for the usual vectors.
    constexpr int kUsual = 128;
    auto rebuild = [&](const FragmentPair<E>* parts) {
      const int half = padded_half(dim);
      MC_NO_UNROLL
      for (int n = 0; n < half / 16; ++n) rebuild_step<E, Most, Tiles>(block, half, n, steps, parts, y, add);
    };
    if (map_in_shared < 0) return rebuild(static_cast<const FragmentPair<E>*>(map));
    const auto* const parts = reinterpret_cast<const FragmentPair<E>*>(block.shared + map_in_shared);
    if (dim != kUsual) return rebuild(parts);
    MC_UNROLL
    for (int n = 0; n < kUsual / 32; ++n) {
      rebuild_step<E, Most, Tiles>(block, Fixed<kUsual / 2>{}, n, steps, parts, y, add);
    }
  }

  template <class E, class Block, class F>
  MC_HD void rebuild_any(Block& block, int half, int steps, F add) const {
    const auto* const parts = static_cast<const FragmentB<E>*>(map_in_shared >= 0 ? block.shared + map_in_shared : map);
    for (int n = 0; n < half / 16; ++n) {
      RebuiltStep<Block, 1> sum;
      load_offset(block, n, half, sum);
      for (int step = 0; step < steps; ++step) {
        typename Block::template PerThread<FragmentA<E>> y;
        block.each([&](Thread thread) { y(thread) = rows.template row<E>(thread, step); });
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          typename Block::template PerThread<FragmentB<E>> part;
          block.each([&](Thread thread) {
            part(thread) =
                parts[rebuild_fragment(false, padded_steps(steps), tile_of(n, half, i), step, thread.lane())];
          });
          block.multiply_add(sum[0][i], y, part);
        }
      }
      add(half, n, sum);
    }
  }
};

}  // namespace minicache
