// Logits of keys stored before RoPE: a warp rebuilds 16 keys at a time on the tensor cores, turns them by their places in
// the cache block, and multiplies with queries turned back by the block's position. Neither leaves the chip.
//
//     q . R(p + r) k = (R(-p) q) . (R(r) k),    k = nu ([y | residual] [P | A]^T) + c
//
// Halves of a key (component i is paired with i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/key_logits.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ceil_div(dim / 2, 16) * 16; }

// Steps of 16 components of a turned query.
MC_HD int turned_steps(int dim) { return 2 * padded_half(dim) / 16; }

// Steps of 16 components of [y | residual].
MC_HD int rebuild_steps(const StreamShape& shape) {
  return (shape.stored + (shape.has_residual() ? shape.dim : 0)) / 16;
}

// Fragments B of [P | A]^T of one slot: [padded key / 8][steps][lanes].
template <class T>
MC_HD std::int64_t rebuild_fragments(const StreamShape& shape) {
  return static_cast<std::int64_t>(2 * padded_half(shape.dim) / 8) * rebuild_steps(shape) * kWarp;
}

struct KeyRebuild {
  const void* map;  // fragments, in shared memory if they fit
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
  MC_HD void logits(Block& block, const Stage<Kind, Formats>& stage, const QueryFragments& queries, int first,
                    float scale, Scores scores, int token) const {
    using E = Code<T>;
    constexpr bool kOwn = is_known(Kind);  // the products' operands stay in registers
    constexpr int kSteps = kOwn ? Kind / 16 : 1;
    const StreamShape& shape = stage.reader.shape;
    const int steps = kOwn ? kSteps : rebuild_steps(shape), half = padded_half(shape.dim);
    typename Block::template PerThread<FragmentA<E>> y[kSteps];
    if constexpr (kOwn) {
      read_rows<T>(block, stage, y);
    } else {
      store_rows<T>(block, stage, steps);
    }
    typename Block::template PerThread<FragmentD> logit;
    block.each([&](Thread thread) { logit(thread) = FragmentD{}; });
    for (int d = 0; d < half; d += 16) {
      // Sums 0, 1: components d to d + 15; 2, 3: those they are paired with.
      typename Block::template PerThread<FragmentD> key[4];
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int n = 0; n < 4; ++n) key[n](thread) = FragmentD{};
      });
      auto add = [&](int step, const typename Block::template PerThread<FragmentA<E>>& part) {
        MC_UNROLL
        for (int n = 0; n < 4; ++n) {
          const int tile = (d + n / 2 * half) / 8 + n % 2;
          typename Block::template PerThread<FragmentB<E>> map_part;
          block.each([&](Thread thread) {
            map_part(thread) = static_cast<const FragmentB<E>*>(map)[(tile * steps + step) * kWarp + thread.lane()];
          });
          block.multiply_add(key[n], part, map_part);
        }
      };
      if constexpr (kOwn) {
        MC_UNROLL
        for (int step = 0; step < kSteps; ++step) add(step, y[step]);
      } else {
        for (int step = 0; step < steps; ++step) {
          block.each([&](Thread thread) { y[0](thread) = row<E>(thread, steps, step); });
          add(step, y[0]);
        }
      }
      typename Block::template PerThread<FragmentA<E>> turned[2];
      block.each([&](Thread thread) {
        const FragmentD sums[4] = {key[0](thread), key[1](thread), key[2](thread), key[3](thread)};
        turn_keys<T>(thread, stage, sums, d, turned[0](thread), turned[1](thread));
      });
      MC_UNROLL
      for (int n = 0; n < 2; ++n) {
        typename Block::template PerThread<FragmentB<E>> query;
        block.each([&](Thread thread) {
          query(thread) = queries.at<E, T>(first + (d + n * half) / 16, thread.lane());
        });
        block.multiply_add(logit, turned[n], query);
      }
    }
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4, row = 16 * thread.warp() + thread.lane() / 4;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) scores(2 * t + i % 2, token + row + 8 * (i / 2)) = logit(thread).x[i] * scale;
    });
  }

 private:
  // A unit of N t-runs of the warp's 16 tokens, from component `at` of run n on, as numbers: N / 4 fragments A.
  template <class T, Format F, int N, int Kind, class Formats>
  MC_HD static void dequantize(Thread thread, const Stage<Kind, Formats>& stage, int n, int at,
                               FragmentA<Code<T>>* out) {
    using E = Code<T>;
    const char* const base = stage.rows(n);
    const int own = 16 * thread.warp() + thread.lane() / 4, stride = stage.stride(n);
    auto rows = [&](Thread, int half) { return base + (own + 8 * half) * stride; };
    FragmentA<Element<T, F>> unit[N / 4];
    read_unit<T, F, N, false>(thread, at, rows, stage.words(n), stage.channel_ranges(n), unit);
    const TokenRanges ranges = stage.token_ranges(n);
    MC_UNROLL
    for (int s = 0; s < N / 4; ++s) {
      MC_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (has_ranges(F)) {
          const float scale = ranges.scale(own + 8 * (j % 2)), lowest = ranges.minimum(own + 8 * (j % 2));
          const Pair<E> x = pair_of(unit[s], j);
          put_pair(out[s], j,
                   ranges.scales < 0 ? x : fused(x, make_pair<E>(scale, scale), make_pair<E>(lowest, lowest)));
        } else if constexpr (std::is_same_v<Element<T, F>, E>) {
          put_pair(out[s], j, pair_of(unit[s], j));
        } else {
          const auto x = pair_of(unit[s], j);
          put_pair(out[s], j, make_pair<E>(first_of(x), second_of(x)));
        }
      }
    }
  }

  // Rows of the warp's 16 tokens, components in the order of `QueryFragments::component`: in registers,
  template <class T, int Kind, class Formats, class Block>
  MC_HD static void read_rows(Block& block, const Stage<Kind, Formats>& stage,
                              typename Block::template PerThread<FragmentA<Code<T>>> (&y)[Kind / 16]) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int at = 0; at < Kind; at += 32) {
        FragmentA<Code<T>> unit[2];
        dequantize<T, Formats::format, 8>(thread, stage, 0, at, unit);
        y[at / 16](thread) = unit[0];
        y[at / 16 + 1](thread) = unit[1];
      }
    });
  }

  // or in `rows`, run by run.
  template <class T, int Kind, class Formats, class Block>
  MC_HD void store_rows(Block& block, const Stage<Kind, Formats>& stage, int steps) const {
    using E = Code<T>;
    stage.each_run([&](int n) {
      const int length = stage.length(n);
      const int first = (n == kResidualRun ? stage.reader.shape.stored : stage.run(n).stored) / 16;
      Formats::with(stage.run(n).format, [&](auto tag) {
        constexpr Format kFormat = decltype(tag)::value;
        block.each([&](Thread thread) {
          FragmentA<E> unit[2];
          int at = 0;
          for (; at + 32 <= length; at += 32) {
            dequantize<T, kFormat, 8>(thread, stage, n, at, unit);
            row<E>(thread, steps, first + at / 16) = unit[0];
            row<E>(thread, steps, first + at / 16 + 1) = unit[1];
          }
          if (at == length) return;
          dequantize<T, kFormat, 4>(thread, stage, n, at, unit);
          row<E>(thread, steps, first + at / 16) = unit[0];
        });
      });
    });
  }

  // Keys as they come out of the product, turned by their places, become fragments A of the next one: columns 8 n + 2 t +
  // i are its k.
  template <class T, int Kind, class Formats>
  MC_HD void turn_keys(Thread thread, const Stage<Kind, Formats>& stage, const FragmentD (&sums)[4], int d,
                       FragmentA<Code<T>>& low, FragmentA<Code<T>>& high) const {
    using E = Code<T>;
    const int dim = stage.reader.shape.dim, half = padded_half(dim);
    const int t = thread.lane() % 4, row = 16 * thread.warp() + thread.lane() / 4;
    const TokenRanges norms = stage.norms();
    MC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float norm = norms.scale(row + 8 * j);
      MC_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int c = d + 8 * n + 2 * t;
        const float* const lower = offset + c;
        const float* const upper = offset + c + half;
        const Pair<E> a = round_pair<E>(norm * sums[n].x[2 * j] + lower[0], norm * sums[n].x[2 * j + 1] + lower[1]);
        const Pair<E> b =
            round_pair<E>(norm * sums[n + 2].x[2 * j] + upper[0], norm * sums[n + 2].x[2 * j + 1] + upper[1]);
        const Turn<E> by = turn<E>(dim, row + 8 * j, c / 2);
        const Pair<E> zero = make_pair<E>(-0.0f, -0.0f);
        put_pair(low, j + 2 * n, fused(a, by.cosine, negated(fused(b, by.sine, zero))));
        put_pair(high, j + 2 * n, fused(b, by.cosine, fused(a, by.sine, zero)));
      }
    }
  }
};

}  // namespace minicache
