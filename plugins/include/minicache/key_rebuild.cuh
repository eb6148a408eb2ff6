// Logits of keys stored before RoPE: a warp rebuilds 16 keys at a time on the tensor cores, turns them by their places in
// the cache block, and multiplies with queries turned back by the block's position. Neither leaves the chip.
//
//     q . R(p + r) k = (R(-p) q) . (R(r) k),    k = (nu [y | residual]) [P | A]^T + c
//
// Halves of a key (component i is paired with i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/known_logits.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ceil_div(dim / 2, 16) * 16; }

// Steps of 16 components of a turned query.
MC_HD int turned_steps(int dim) { return 2 * padded_half(dim) / 16; }

// Steps of 16 components of [y | residual].
MC_HD int rebuild_steps(const StreamShape& shape) {
  return (shape.stored + (shape.has_residual() ? shape.dim : 0)) / 16;
}

// The same with a step of zeros behind an odd number of them.
MC_HD constexpr int padded_steps(int steps) { return (steps + 1) / 2 * 2; }

// Fragments B of [P | A]^T of one slot: [padded key / 8][padded steps][lanes], or of plain streams (`paired`)
// [padded key / 8][padded steps / 2][lanes][2].
template <class T>
MC_HD std::int64_t rebuild_fragments(const StreamShape& shape) {
  return static_cast<std::int64_t>(2 * padded_half(shape.dim) / 8) * padded_steps(rebuild_steps(shape)) * kWarp;
}
MC_HD int rebuild_fragment(bool paired, int steps, int tile, int step, int lane) {
  if (!paired) return (tile * steps + step) * kWarp + lane;
  return ((tile * steps + (step & ~1)) * kWarp + 2 * lane) + step % 2;
}
constexpr int kPlainSteps = 32 * kDecodeWarps / 16;  // of a plain stream, at most

struct KeyRebuild {
  const void* map;             // fragments,
  std::int32_t map_in_shared;  // or where they lie in shared memory if they fit there; -1: they do not
  char* rows;       // [y | residual] of the warps' tokens, as fragments A that only their own threads use
  char* turns;      // [kBlockSize][padded half / 2] `Turn`s
  float* offset;    // c of the slot by component of the padded key

  // Cosine and sine of a cache block's position, for one component of half a padded key.
  struct Base {
    float cosine, sine;
  };
  // Cosines and sines of components 2 n and 2 n + 1 of a place in a cache block, [kBlockSize] rows of `turn_stride` bytes.
  template <class E>
  struct alignas(2 * sizeof(Pair<E>)) Turn {
    Pair<E> cosine, sine;
  };
  // 8 banks further per place: a warp that reads neighbouring places and components meets no conflict.
  template <class E>
  MC_HD static int turn_stride(int dim) {
    return padded_half(dim) / 2 * static_cast<int>(sizeof(Turn<E>)) + 32;
  }
  // Bytes of the table: `turns`, behind them [padded half] `Base`s of the place one cache block on.
  template <class E>
  MC_HD static int turn_bytes(int dim) {
    return kBlockSize * turn_stride<E>(dim);
  }
  template <class E>
  MC_HD static int table_bytes(int dim) {
    return turn_bytes<E>(dim) + padded_half(dim) * static_cast<int>(sizeof(Base));
  }
  template <class E>
  MC_HD Turn<E>& turn(int dim, int place, int n) const {
    return reinterpret_cast<Turn<E>*>(turns + place * turn_stride<E>(dim))[n];
  }

  // Number n of the table's entry for a place.
  template <class E>
  MC_HD static Turn<E> turn_of(int dim, const float* inverse_frequencies, int place, int n) {
    float sine[2] = {}, cosine[2] = {};
    MC_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (2 * n + i >= dim / 2) continue;
      sine_and_cosine(multiply(static_cast<float>(place), inverse_frequencies[2 * n + i]), sine[i], cosine[i]);
    }
    return {make_pair<E>(cosine[0], cosine[1]), make_pair<E>(sine[0], sine[1])};
  }

  // Of component c at a position; in the padding no turn.
  MC_HD static Base base_of(int dim, const float* inverse_frequencies, int position, int c) {
    Base base{1.0f, 0.0f};
    if (c < dim / 2) {
      sine_and_cosine(multiply(static_cast<float>(position), inverse_frequencies[c]), base.sine, base.cosine);
    }
    return base;
  }

  // Bytes of the rows of all warps as fragments A: [kDecodeWarps][steps][lanes].
  template <class T>
  MC_HD static int row_bytes(const StreamShape& shape) {
    return kDecodeThreads * rebuild_steps(shape) * static_cast<int>(sizeof(FragmentA<Code<T>>));
  }
  template <class E>
  MC_HD FragmentA<E>& row(Thread thread, int steps, int step) const {
    return reinterpret_cast<FragmentA<E>*>(rows)[(thread.warp() * steps + step) * kWarp + thread.lane()];
  }

  // Component of the padded key's component d, -1 in the padding.
  MC_HD static int component(int dim, int d) {
    const int half = padded_half(dim), place = d % half;
    return place < dim / 2 ? place + d / half * (dim / 2) : -1;
  }

  // `first`: step of the fragments from which on the queries lie that are turned back by the stage's position.
  template <class T, int Kind, class Formats, class Block>
  MC_HD void logits(Block& block, const KeyStage<Kind, Formats>& stage, const QueryFragments& queries, int first,
                    float scale, Scores scores, int token) const {
    using E = Code<T>;
    const StreamShape& shape = stage.reader.shape;
    const int half = padded_half(shape.dim);
    typename Block::template PerThread<FragmentD> logit;
    block.each([&](Thread thread) { logit(thread) = FragmentD{}; });
    // Keys of the warp's tokens, components d to d + 15 (sums 0 and 1) and those they are paired with (2 and 3).
    auto add = [&](int d, typename Block::template PerThread<FragmentD>(&key)[4]) {
      typename Block::template PerThread<FragmentA<E>> turned[2];
      block.each([&](Thread thread) {
        const FragmentD sums[4] = {key[0](thread), key[1](thread), key[2](thread), key[3](thread)};
        turn_keys<T>(thread, shape.dim, sums, d, turned[0](thread), turned[1](thread));
      });
      MC_UNROLL
      for (int n = 0; n < 2; ++n) {
        typename Block::template PerThread<FragmentB<E>> query;
        block.each([&](Thread thread) {
          query(thread) = queries.at<E, T>(first + (d >> 4) + n * (half >> 4), thread.lane());
        });
        block.multiply_add(logit, turned[n], query);
      }
    };
    if constexpr (is_known(Kind)) {
      typename Block::template PerThread<FragmentA<E>> y[Kind / 16];
      read_rows<T>(block, stage, y);
      rebuild_plain<E, Kind / 16>(block, half, Fixed<Kind / 16>{}, y, add);
    } else {
      const int steps = rebuild_steps(shape);
      store_rows<T>(block, stage, steps);
      if constexpr (Kind == kPlain) {
        typename Block::template PerThread<FragmentA<E>> y[kPlainSteps];
        block.each([&](Thread thread) {
          MC_UNROLL
          for (int step = 0; step < kPlainSteps; ++step) {
            if (step < padded_steps(steps)) y[step](thread) = FragmentA<E>{};
            if (step < steps) y[step](thread) = row<E>(thread, steps, step);
          }
        });
        rebuild_plain<E, kPlainSteps>(block, half, padded_steps(steps), y, add);
      } else {
        rebuild_any<E>(block, half, steps, add);
      }
    }
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4, row = 16 * thread.warp() + thread.lane() / 4;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) scores(2 * t + i % 2, token + row + 8 * (i / 2)) = logit(thread).x[i] * scale;
    });
  }

 private:
  // Tile number n of the four that `add` takes: components, counted in eights.
  MC_HD static int tile_of(int d, int half, int n) { return (d >> 3) + n / 2 * (half >> 3) + n % 2; }

  // c, to which the products with the map are added.
  template <class Block>
  MC_HD void begin(Block& block, int d, int half, typename Block::template PerThread<FragmentD> (&key)[4]) const {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < 4; ++n) {
        const auto c = detail::load<Two<float>>(offset + d + n / 2 * half + 8 * (n % 2) + 2 * (thread.lane() % 4));
        key[n](thread) = FragmentD{{c.x[0], c.x[1], c.x[0], c.x[1]}};
      }
    });
  }

  // `steps`: an even number, at most Most.
  template <class E, int Most, class Block, class Steps, class F>
  MC_HD void rebuild_plain(Block& block, int half, Steps steps,
                           const typename Block::template PerThread<FragmentA<E>> (&y)[Most], F add) const {
    auto rebuild = [&](const FragmentPair<E>* map) {
      MC_UNROLL_TWICE
      for (int d = 0; d < half; d += 16) {
        typename Block::template PerThread<FragmentD> key[4];
        begin(block, d, half, key);
        MC_UNROLL
        for (int step = 0; step < Most; step += 2) {
          if (step >= steps) break;
          MC_UNROLL
          for (int n = 0; n < 4; ++n) {
            const int place = rebuild_fragment(true, steps, tile_of(d, half, n), step, 0) / 2;
            typename Block::template PerThread<FragmentB<E>> part[2];
            block.each([&](Thread thread) {
              const FragmentPair<E> both = map[place + thread.lane()];
              part[0](thread) = both.step[0];
              part[1](thread) = both.step[1];
            });
            block.multiply_add(key[n], y[step], part[0]);
            block.multiply_add(key[n], y[step + 1], part[1]);
          }
        }
        add(d, key);
      }
    };
    // Twice, so that the compiler knows which memory it is.
    if (map_in_shared >= 0) {
      rebuild(reinterpret_cast<const FragmentPair<E>*>(block.shared + map_in_shared));
    } else {
      rebuild(static_cast<const FragmentPair<E>*>(map));
    }
  }

  template <class E, class Block, class F>
  MC_HD void rebuild_any(Block& block, int half, int steps, F add) const {
    const auto* const parts =
        static_cast<const FragmentB<E>*>(map_in_shared >= 0 ? block.shared + map_in_shared : map);
    for (int d = 0; d < half; d += 16) {
      typename Block::template PerThread<FragmentD> key[4];
      begin(block, d, half, key);
      for (int step = 0; step < steps; ++step) {
        typename Block::template PerThread<FragmentA<E>> y;
        block.each([&](Thread thread) { y(thread) = row<E>(thread, steps, step); });
        MC_UNROLL
        for (int n = 0; n < 4; ++n) {
          typename Block::template PerThread<FragmentB<E>> part;
          block.each([&](Thread thread) {
            part(thread) = parts[rebuild_fragment(false, padded_steps(steps), tile_of(d, half, n), step, thread.lane())];
          });
          block.multiply_add(key[n], y, part);
        }
      }
      add(d, key);
    }
  }

  // What the numbers of the thread's rows, lane / 4 and lane / 4 + 8 of the warp's tile, are multiplied with, and what is
  // added: ranges and norms of the tokens.
  template <class E>
  struct RowRanges {
    bool any;
    Pair<E> factor[2], constant[2];

    MC_HD static RowRanges of(const TokenRanges& ranges, const TokenRanges& norms, int row) {
      RowRanges result{ranges.scales >= 0 || norms.scales >= 0, {}, {}};
      MC_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float norm = norms.scale(row + 8 * j);
        const float scale = norm * ranges.scale(row + 8 * j), lowest = norm * ranges.minimum(row + 8 * j);
        result.factor[j] = round_pair<E>(scale, scale);
        result.constant[j] = round_pair<E>(lowest, lowest);
      }
      return result;
    }
    MC_HD FragmentA<E> apply(const FragmentA<E>& unit) const {
      if (!any) return unit;
      FragmentA<E> result;
      MC_UNROLL
      for (int j = 0; j < 4; ++j) put_pair(result, j, fused(pair_of(unit, j), factor[j % 2], constant[j % 2]));
      return result;
    }
  };

  // A unit of N t-runs of the warp's 16 tokens, from component `at` of run n on, as numbers: N / 4 fragments A.
  template <class T, Format F, int N, int Kind, class Formats>
  MC_HD static void dequantize(Thread thread, const KeyStage<Kind, Formats>& stage, const RowRanges<Code<T>>& ranges,
                               int n, int at, FragmentA<Code<T>> (&out)[2]) {
    using E = Code<T>;
    const char* const base = stage.rows(n);
    const int own = own_row(thread), stride = stage.stride(n);
    auto rows = [&](Thread, int half) { return base + (own + 8 * half) * stride; };
    FragmentA<Element<T, F>> unit[N / 4];
    read_unit<T, F, N>(thread, at, rows, stage.words(n), stage.channel_ranges(n), unit);
    MC_UNROLL
    for (int s = 0; s < N / 4; ++s) {
      if constexpr (std::is_same_v<Element<T, F>, E>) {
        out[s] = ranges.apply(unit[s]);
      } else {
        MC_UNROLL
        for (int j = 0; j < 4; ++j) {
          const auto x = pair_of(unit[s], j);
          const float norm = stage.norms().scale(own + 8 * (j % 2));
          put_pair(out[s], j, round_pair<E>(norm * first_of(x), norm * second_of(x)));
        }
      }
    }
  }
  MC_HD static int own_row(Thread thread) { return 16 * thread.warp() + thread.lane() / 4; }

  // Rows of the warp's 16 tokens: of known runs in registers, components in the order of `known_component`,
  template <class T, int Kind, class Formats, class Block>
  MC_HD static void read_rows(Block& block, const KeyStage<Kind, Formats>& stage,
                              typename Block::template PerThread<FragmentA<Code<T>>> (&y)[Kind / 16]) {
    block.each([&](Thread thread) {
      const auto ranges = RowRanges<Code<T>>::of(stage.token_ranges(0), stage.norms(), own_row(thread));
      const RowWords<Kind> rows[2] = {RowWords<Kind>::load(thread, stage, 0), RowWords<Kind>::load(thread, stage, 1)};
      MC_UNROLL
      for (int n = 0; n < RowWords<Kind>::kWords; ++n) {
        FragmentA<Code<T>> unit[2];
        read_known_unit<T, Formats::format, false>(thread, rows, n, stage.channel_ranges(0), unit);
        y[2 * n](thread) = ranges.apply(unit[0]);
        y[2 * n + 1](thread) = ranges.apply(unit[1]);
      }
    });
  }

  // of others in `rows`, run by run, in the order of `QueryFragments::component`.
  template <class T, int Kind, class Formats, class Block>
  MC_HD void store_rows(Block& block, const KeyStage<Kind, Formats>& stage, int steps) const {
    using E = Code<T>;
    stage.each_run([&](int n) {
      const int length = stage.length(n);
      const int first = (n == kResidualRun ? stage.reader.shape.stored : stage.run(n).stored) / 16;
      Formats::with(stage.run(n).format, [&](auto tag) {
        constexpr Format kFormat = decltype(tag)::value;
        block.each([&](Thread thread) {
          const auto ranges = RowRanges<E>::of(stage.token_ranges(n), stage.norms(), own_row(thread));
          FragmentA<E> unit[2];
          int at = 0;
          for (; at + 32 <= length; at += 32) {
            dequantize<T, kFormat, 8>(thread, stage, ranges, n, at, unit);
            row<E>(thread, steps, first + at / 16) = unit[0];
            row<E>(thread, steps, first + at / 16 + 1) = unit[1];
          }
          if (at == length) return;
          dequantize<T, kFormat, 4>(thread, stage, ranges, n, at, unit);
          row<E>(thread, steps, first + at / 16) = unit[0];
        });
      });
    });
  }

  // Keys as they come out of the product, turned by their places, become fragments A of the next one: columns 8 n + 2 t +
  // i are its k.
  template <class T>
  MC_HD void turn_keys(Thread thread, int dim, const FragmentD (&sums)[4], int d, FragmentA<Code<T>>& low,
                       FragmentA<Code<T>>& high) const {
    using E = Code<T>;
    const int t = thread.lane() % 4, row = 16 * thread.warp() + thread.lane() / 4;
    MC_UNROLL
    for (int j = 0; j < 2; ++j) {
      MC_UNROLL
      for (int n = 0; n < 2; ++n) {
        const Pair<E> a = round_pair<E>(sums[n].x[2 * j], sums[n].x[2 * j + 1]);
        const Pair<E> b = round_pair<E>(sums[n + 2].x[2 * j], sums[n + 2].x[2 * j + 1]);
        const Turn<E> by = turn<E>(dim, row + 8 * j, (d >> 1) + 4 * n + t);
        const Pair<E> zero = make_pair<E>(-0.0f, -0.0f);
        put_pair(low, j + 2 * n, fused(a, by.cosine, negated(fused(b, by.sine, zero))));
        put_pair(high, j + 2 * n, fused(b, by.cosine, fused(a, by.sine, zero)));
      }
    }
  }
};

}  // namespace minicache
