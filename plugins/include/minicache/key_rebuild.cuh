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
  char* rows;       // [kDecodeWarps][16] rows of [y | residual]
  char* turns;      // [kBlockSize][padded half / 2] `Turn`s
  float* offset;    // c of the slot by component of the padded key

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

  template <class T>
  MC_HD static int row_stride(const StreamShape& shape) {
    return stage_stride(rebuild_steps(shape) * 16 * static_cast<int>(sizeof(Code<T>)));
  }

  // Component of the padded key's component d, -1 in the padding.
  MC_HD static int component(int dim, int d) {
    const int half = padded_half(dim), place = d % half;
    return place < dim / 2 ? place + d / half * (dim / 2) : -1;
  }

  // Rows of the warp's 16 tokens, dequantized: two threads a row.
  template <class T, int Kind, class Formats, class Block>
  MC_HD void dequantize(Block& block, const Stage<Kind, Formats>& stage) const {
    const int stride = row_stride<T>(stage.reader.shape);
    int start = 0;
    stage.each_run([&](int n) {
      const StageRun& run = stage.run(n);
      const TokenRanges ranges = stage.token_ranges(n);
      const char* first = stage.rows(n);
      const int from = stage.stride(n);
      const bool words = stage.words(n);
      const Half *scales = stage.channel_scales(n), *minima = stage.channel_minima(n);
      with_format(run.format, [&](auto tag) {
        constexpr Format kFormat = decltype(tag)::value;
        block.each([&](Thread thread) {
          const int row = thread.index / 2, token = row;
          Code<T>* target = reinterpret_cast<Code<T>*>(rows + row * stride) + start;
          const float scale = ranges.scale(token), lowest = ranges.minimum(token);
          for (int at = thread.index % 2 * 4; at < run.length; at += 8) {
            Pair<Element<T, kFormat>> x[2];
            read_run<T, kFormat, 4>(first + row * from, at, words, x);
            MC_UNROLL
            for (int i = 0; i < 4; ++i) {
              float y = i < 2 ? first_of(x[i % 2]) : second_of(x[i % 2]);
              if constexpr (has_ranges(kFormat)) {
                const float factor = scales == nullptr ? scale : to_float(scales[at + i]);
                const float constant =
                    scales == nullptr || !is_integer(kFormat) ? lowest : to_float(minima[at + i]);
                y = factor * y + constant;
              }
              target[at + i] = from_float<Code<T>>(y);
            }
          }
        });
      });
      start += run.length;
    });
    block.sync_warp();
  }

  // `first`: step of the fragments from which on the queries lie that are turned back by the stage's position.
  template <class T, int Kind, class Formats, class Block>
  MC_HD void logits(Block& block, const Stage<Kind, Formats>& stage, const QueryFragments& queries, int first,
                    float scale, Scores scores, int token) const {
    using E = Code<T>;
    constexpr bool kOwn = is_known(Kind);  // the products' operands stay in registers
    constexpr int kSteps = kOwn ? Kind / 16 : 1;
    const StreamShape& shape = stage.reader.shape;
    const int stride = row_stride<T>(shape), steps = kOwn ? kSteps : rebuild_steps(shape);
    const int half = padded_half(shape.dim);
    typename Block::template PerThread<FragmentA<E>> y[kSteps];
    if constexpr (kOwn) {
      read_rows<T>(block, stage, y);
    } else {
      block.sync_warp();
      dequantize<T>(block, stage);
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
          block.template load_matrices<false>(y[0], [&](Thread thread) -> const void* {
            const int l = thread.lane(), row = 16 * thread.warp() + l % 8 + 8 * (l / 8 % 2);
            return rows + row * stride + (16 * step + 8 * (l / 16)) * static_cast<int>(sizeof(E));
          });
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
  // Rows of the warp's 16 tokens as fragments A, components in the order of `QueryFragments::component`.
  template <class T, int Kind, class Formats, class Block>
  MC_HD static void read_rows(Block& block, const Stage<Kind, Formats>& stage,
                              typename Block::template PerThread<FragmentA<Code<T>>> (&y)[Kind / 16]) {
    using E = Code<T>;
    constexpr Format kFormat = Formats::format;
    const char* const base = stage.rows(0);
    const TokenRanges ranges = stage.token_ranges(0);
    block.each([&](Thread thread) {
      const int own = 16 * thread.warp() + thread.lane() / 4;
      auto rows = [&](Thread, int half) { return base + (own + 8 * half) * stage.stride(0); };
      MC_UNROLL
      for (int at = 0; at < Kind; at += 32) {
        FragmentA<E> unit[2];
        read_unit<T, kFormat, 8, false>(thread, at, rows, true, stage.channel_scales(0), stage.channel_minima(0), unit);
        y[at / 16](thread) = unit[0];
        y[at / 16 + 1](thread) = unit[1];
      }
      if (ranges.scales < 0) return;
      MC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float scale = ranges.scale(own + 8 * half), lowest = ranges.minimum(own + 8 * half);
        const Pair<E> factor = make_pair<E>(scale, scale), constant = make_pair<E>(lowest, lowest);
        MC_UNROLL
        for (int step = 0; step < Kind / 16; ++step) {
          MC_UNROLL
          for (int j = half; j < 4; j += 2) {
            put_pair(y[step](thread), j, fused(pair_of(y[step](thread), j), factor, constant));
          }
        }
      }
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
