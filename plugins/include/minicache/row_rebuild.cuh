// A stream's rows as vectors: a warp rebuilds 16 of a cache block's on the tensor cores. Rows at the same places of two
// blocks share what is read of the map, where registers hold them.
#pragma once

#include "minicache/run_sums.cuh"

namespace minicache {

constexpr int kPlainSteps = 32 * kDecodeWarps / 16;  // of a plain stream, at most

struct RowRebuild {
  RebuildMap map;
  StoredRows rows;  // of plain streams

  // `fragments`: of all slots; `shared`: where things lie in a thread block's shared memory.
  template <class T, int Kind, class Block, class Shared>
  MC_HD static RowRebuild of(const Block& block, const StreamReader& reader, const void* fragments, int slot,
                             const Shared& shared) {
    RowRebuild rebuild{};
    const auto own = static_cast<std::int64_t>(slot) * RebuildMap::bytes<T>(reader);
    rebuild.map.fragments = static_cast<const char*>(fragments) + own;
    rebuild.map.shared = shared.map_in_shared ? shared.map : -1;
    rebuild.map.offset = reinterpret_cast<float*>(block.shared + shared.offset);
    if (!holds_rows(Kind)) rebuild.map.rest = RebuildMap::whole_steps(reader);
    if (Kind == kPlain) rebuild.rows = {block.shared + shared.rows, rebuild_steps(reader.shape)};
    return rebuild;
  }

  // Fills the map's offset and the padding of the rows, without a `sync`.
  template <class T, int Kind, class Block>
  MC_HD void prepare(Block& block, const StreamReader& reader, int slot, bool neighbours) const {
    block.each([&](Thread thread) {
      if (Kind == kPlain) rows.template pad<Code<T>>(thread);
      map.fill_offset(thread, reader, slot, neighbours);
    });
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
      rebuild_held<E, Kind, Kind / 16, Tiles>(block, dim, Fixed<Kind / 16>{}, y, add);
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
      rebuild_held<E, Kind, kPlainSteps, Tiles>(block, dim, steps, y, add);
    } else {
      static_assert(Tiles == 1, "there is room for the sums of one tile");
      RunSums::each_step<T>(block, map, stages[0], add);
    }
  }

 private:
  template <class E, class Block, int Tiles>
  using Rows = typename Block::template PerThread<FragmentA<E>>[Tiles];

  // `steps`: an even number, at most Most.
  template <class E, int Kind, int Most, int Tiles, class Block, class Half, class Steps, class F>
  MC_HD void rebuild_step(Block& block, Half half, int n, Steps steps, const FragmentPair<E>* fragments,
                          const Rows<E, Block, Tiles> (&y)[Most], F add) const {
    RebuiltStep<Block, 1> c;
    RebuiltStep<Block, Tiles> sum;
    map.template load_offset<Kind>(block, n, half, c);
    MC_UNROLL
    for (int step = 0; step < Most; step += 2) {
      if (step >= steps) break;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int place = rebuild_fragment(true, 0, steps, RebuildMap::tile_of(n, half, i), step, 0) / 2;
        typename Block::template PerThread<FragmentB<E>> part[2];
        block.each([&](Thread thread) {
          const FragmentPair<E> both = fragments[place + thread.lane()];
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

  template <class E, int Kind, int Most, int Tiles, class Block, class Steps, class F>
  MC_HD void rebuild_held(Block& block, int dim, Steps steps, const Rows<E, Block, Tiles> (&y)[Most], F add) const {
    constexpr int kUsual = RebuildMap::kUsual;
    // Twice, so that the compiler knows which memory it is; and once for the usual vectors.
    auto rebuild = [&](const FragmentPair<E>* parts) {
      const int half = padded_half(dim);
      MC_NO_UNROLL
      for (int n = 0; n < half / 16; ++n) rebuild_step<E, Kind, Most, Tiles>(block, half, n, steps, parts, y, add);
    };
    if (map.shared < 0) return rebuild(static_cast<const FragmentPair<E>*>(map.fragments));
    const auto* const parts = reinterpret_cast<const FragmentPair<E>*>(block.shared + map.shared);
    if (dim != kUsual) return rebuild(parts);
    MC_UNROLL
    for (int n = 0; n < kUsual / 32; ++n) {
      rebuild_step<E, Kind, Most, Tiles>(block, Fixed<kUsual / 2>{}, n, steps, parts, y, add);
    }
  }
};

}  // namespace minicache
