// A tile's rows of any runs as vectors, unit by unit: numbers of 32 components, or 16 that are left of a run, are
// multiplied with all of the map's columns before the next ones are read; again for larger vectors, whose sums
// registers do not hold.
#pragma once

#include "minicache/rebuild_map.cuh"

namespace minicache {

struct RunSums {
  static constexpr int kSums = 4;  // steps of half a vector whose sums a thread has in registers at a time
  template <class Block>
  using Sums = RebuiltStep<Block, 1>[kSums];

  // As `RowRebuild::each_step`.
  template <class T, int Kind, class Formats, class Block, class F>
  MC_HD static void each_step(Block& block, const RebuildMap& map, const KeyStage<Kind, Formats>& stage, F add) {
    const int dim = stage.reader.shape.dim, half = padded_half(dim);
    Sums<Block> sums;
    MC_NO_UNROLL
    for (int first = 0; first < half / 16; first += kSums) {
      const int count = minimum(kSums, half / 16 - first);
      MC_UNROLL
      for (int n = 0; n < kSums; ++n) {
        if (n < count) map.template load_offset<Kind>(block, first + n, half, sums[n]);
      }
      add_runs<T>(block, map, stage, first, count, sums);
      MC_UNROLL
      for (int n = 0; n < kSums; ++n) {
        if (n >= count) break;
        if (dim == RebuildMap::kUsual) {
          add(Fixed<RebuildMap::kUsual / 2>{}, n, sums[n]);
        } else {
          add(half, first + n, sums[n]);
        }
      }
    }
  }

 private:
  template <class T, int Kind, class Formats, class Block>
  MC_HD static void add_runs(Block& block, const RebuildMap& map, const KeyStage<Kind, Formats>& stage, int first,
                             int count, Sums<Block>& sums) {
    using E = Code<T>;
    typename Block::template PerThread<RowNorms> norms;
    block.each([&](Thread thread) { norms(thread) = RowNorms::of(stage.norms(), own_row(thread)); });
    int step = 0, rest_step = map.rest;
    stage.each_run([&](int n) {
      const int units = stage.length(n) >> 5, rest = stage.length(n) >> 4 & 1;
      typename Block::template PerThread<RowRanges<E>> ranges;
      block.each([&](Thread thread) {
        const TokenRanges own = stage.token_ranges(n);
        ranges(thread) = RowRanges<E>::of(own, norms(thread), own_row(thread), own.minima >= 0);
      });
      MC_NO_UNROLL
      for (int u = 0; u < units + rest; ++u) {
        const bool whole = u < units;
        typename Block::template PerThread<FragmentA<E>> y[2];
        Formats::with(stage.run(n).format, [&](auto tag) {
          constexpr Format kFormat = decltype(tag)::value;
          block.each([&](Thread thread) {
            FragmentA<E> own[2] = {};
            if (whole) {
              dequantize<T, kFormat, 8>(thread, stage, norms(thread), ranges(thread), n, u, own);
            } else {
              dequantize<T, kFormat, 4>(thread, stage, norms(thread), ranges(thread), n, 2 * u, own);
            }
            y[0](thread) = own[0];
            y[1](thread) = own[1];
          });
        });
        if (whole) {
          multiply<E, 2>(block, map, stage.reader.shape.dim, first, count, step, y, sums);
          step += 2;
        } else {
          multiply<E, 1>(block, map, stage.reader.shape.dim, first, count, rest_step, y, sums);
          ++rest_step;
        }
      }
    });
  }

  // Adds products with `Steps` steps of the map.
  template <class E, int Steps, class Block>
  MC_HD static void multiply(Block& block, const RebuildMap& map, int dim, int first, int count, int step,
                             const typename Block::template PerThread<FragmentA<E>> (&y)[2], Sums<Block>& sums) {
    constexpr int kUsual = RebuildMap::kUsual;
    const int half = padded_half(dim), place = rebuild_fragment(false, half / 4, 0, 2 * first, step, 0);
    // Twice, so that the compiler knows which memory it is; and once for the usual vectors.
    auto add = [&](const FragmentB<E>* parts, auto half_of_them, auto steps) {
      MC_UNROLL
      for (int n = 0; n < kSums; ++n) {
        if (n >= steps) break;
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int tile = RebuildMap::tile_of(n, half_of_them, i);
          const FragmentB<E>* const from = parts + (place + rebuild_fragment(false, 0, 0, tile, 0, 0));
          typename Block::template PerThread<FragmentB<E>> part[2];
          block.each([&](Thread thread) {
            if constexpr (Steps == 2) {
              const auto both = detail::load<FragmentPair<E>>(from + 2 * thread.lane());
              part[0](thread) = both.step[0];
              part[1](thread) = both.step[1];
            } else {
              part[0](thread) = from[2 * thread.lane()];
            }
          });
          MC_UNROLL
          for (int s = 0; s < Steps; ++s) block.multiply_add(sums[n][0][i], y[s], part[s]);
        }
      }
    };
    if (map.shared < 0) return add(static_cast<const FragmentB<E>*>(map.fragments), half, count);
    const auto* const parts = reinterpret_cast<const FragmentB<E>*>(block.shared + map.shared);
    if (dim != kUsual) return add(parts, half, count);
    add(parts, Fixed<kUsual / 2>{}, Fixed<kUsual / 32>{});
  }
};

}  // namespace minicache
