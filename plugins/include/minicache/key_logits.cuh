// Logits of compressed keys, straight from their codes: rows of tokens times mapped queries on the tensor cores.
#pragma once

#include "minicache/stream_stage.cuh"

namespace minicache {

// Mapped queries in shared memory, in the order the tensor cores take them together with runs of codes.
//
// Components of a run go in units of 32, the last one of 16 if there is a rest. A thread with t = lane % 4 reads N = 8
// (4) neighbouring components of a unit, from N t on; step s (of 16 components) of the unit takes its pairs 2 s and
// 2 s + 1.
struct QueryFragments {
  char* data;
  float* sums;    // [kRuns][kQueryTile]: sum of a query's components of a run, as rounded
  float* parts;   // [kRuns][kDecodeWarps][kQueryTile]
  float* offset;  // [kQueryTile]

  template <class T>
  MC_HD static constexpr int step_bytes() {
    return kWarp * static_cast<int>(sizeof(FragmentB<T>));
  }
  template <class E, class T>
  MC_HD FragmentB<E>& at(int step, int lane) const {
    return reinterpret_cast<FragmentB<E>*>(data + step * step_bytes<T>())[lane];
  }
  MC_HD static int component(int length, int step, int lane, int j, int i) {
    const int whole = length / 32 * 2, t = lane % 4;
    if (step < whole) return step / 2 * 32 + 8 * t + 2 * (step % 2) + j + 4 * i;
    return whole * 16 + 4 * t + j + 2 * i;
  }
};

// Fills the fragments of a run from step `first` on; `number(query, component)` is the query.
template <class T, class Block, class F>
MC_HD void fill_fragments(Block& block, const QueryFragments& fragments, int n, Format format, int length, int first,
                          F number) {
  typename Block::template PerThread<float> sum;
  block.each([&](Thread thread) {
    const int lane = thread.lane();
    float total = 0.0f;
    for (int step = thread.warp(); step < length / 16; step += kDecodeWarps) {
      for (int j = 0; j < 2; ++j) {
        float x[2];
        for (int i = 0; i < 2; ++i) x[i] = number(lane / 4, QueryFragments::component(length, step, lane, j, i));
        if (format == Format::model) {
          const Pair<T> pair = make_pair<T>(x[0], x[1]);
          put_pair(fragments.at<T, T>(first + step, lane), j, pair);
        } else {
          const Pair<Code<T>> pair = make_pair<Code<T>>(x[0], x[1]);
          put_pair(fragments.at<Code<T>, T>(first + step, lane), j, pair);
          total += first_of(pair) + second_of(pair);
        }
      }
    }
    sum(thread) = total;
  });
  block.template reduce_add<4>(sum);
  block.each([&](Thread thread) {
    if (thread.lane() % 4 != 0) return;
    fragments.parts[(n * kDecodeWarps + thread.warp()) * kQueryTile + thread.lane() / 4] = sum(thread);
  });
}

// After a `sync` that follows the filling; another one must follow. `filled(n)`: whether run n has been.
template <class Block, class F>
MC_HD void finish_fragments(Block& block, const QueryFragments& fragments, F filled) {
  block.each([&](Thread thread) {
    const int n = thread.index / kQueryTile, query = thread.index % kQueryTile;
    if (n >= kRuns || !filled(n)) return;
    float sum = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) sum += fragments.parts[(n * kDecodeWarps + w) * kQueryTile + query];
    fragments.sums[thread.index] = sum;
  });
}

// Scales and minima of components `index` and following, in the order of pairs, applied to two rows.
template <Format F, class E, int Pairs>
MC_HD void apply_ranges(const ChannelRanges& ranges, int index, Pair<E> (&x)[2][Pairs]) {
  if (!ranges.any) return;
  Pair<Half> scale[Pairs] = {}, lowest[Pairs] = {};
  read_numbers<2 * Pairs>(ranges.scales() + index, scale);
  if constexpr (is_integer(F)) read_numbers<2 * Pairs>(ranges.minima() + index, lowest);
  MC_UNROLL
  for (int p = 0; p < Pairs; ++p) {
    const Pair<E> factor = convert<E>(scale[p]);
    const Pair<E> constant = is_integer(F) ? convert<E>(lowest[p]) : minus_zeros<E>();
    MC_UNROLL
    for (int half = 0; half < 2; ++half) x[half][p] = fused(x[half][p], factor, constant);
  }
}

// Pairs of rows lane / 4 and lane / 4 + 8 as fragments A of steps of 16 components: two pairs of each row.
template <class E, int Pairs>
MC_HD void put_rows(const Pair<E> (&x)[2][Pairs], FragmentA<E>* keys) {
  MC_UNROLL
  for (int s = 0; s < Pairs / 2; ++s) {
    MC_UNROLL
    for (int j = 0; j < 4; ++j) put_pair(keys[s], j, x[j % 2][2 * s + j / 2]);
  }
}

// The thread's part of unit number `unit` of 4 N components as fragments A: rows lane / 4 and lane / 4 + 8 of the
// warp's tile.
template <class T, Format F, int N, class Rows>
MC_HD void read_unit(Thread thread, int unit, Rows rows, bool words, const ChannelRanges& ranges,
                     FragmentA<Element<T, F>>* keys) {
  using E = Element<T, F>;
  const int chunk = 4 * unit + thread.lane() % 4;
  Pair<E> x[2][N / 2];
  MC_UNROLL
  for (int half = 0; half < 2; ++half) read_run<T, F, N>(rows(thread, half), chunk, words, x[half]);
  if constexpr (has_ranges(F)) apply_ranges<F>(ranges, N * chunk, x);
  put_rows(x, keys);
}

// Adds a unit's products with the queries.
template <class T, Format F, int N, class Block, class Rows>
MC_HD void add_unit(Block& block, typename Block::template PerThread<FragmentD>& sum, const QueryFragments& fragments,
                    int step, int unit, Rows rows, bool words, const ChannelRanges& ranges) {
  using E = Element<T, F>;
  typename Block::template PerThread<FragmentA<E>> keys[N / 4];
  block.each([&](Thread thread) {
    FragmentA<E> own[N / 4];
    read_unit<T, F, N>(thread, unit, rows, words, ranges, own);
    MC_UNROLL
    for (int s = 0; s < N / 4; ++s) keys[s](thread) = own[s];
  });
  MC_UNROLL
  for (int s = 0; s < N / 4; ++s) {
    typename Block::template PerThread<FragmentB<E>> query;
    block.each([&](Thread thread) { query(thread) = fragments.at<E, T>(step + s, thread.lane()); });
    block.multiply_add(sum, keys[s], query);
  }
}

// Products of 16 rows per warp with the queries over one run. `rows(thread, half)` is row lane / 4 + 8 half of the
// warp's tile.
template <class T, class Formats, class Block, class Rows>
MC_HD void add_run(Block& block, typename Block::template PerThread<FragmentD>& sum, const QueryFragments& fragments,
                   int step, Format format, int length, Rows rows, bool words, const ChannelRanges& ranges) {
  Formats::with(format, [&](auto tag) {
    constexpr Format kFormat = decltype(tag)::value;
    const int units = length >> 5;
    MC_NO_UNROLL
    for (int n = 0; n < units; ++n) {
      add_unit<T, kFormat, 8>(block, sum, fragments, step + 2 * n, n, rows, words, ranges);
    }
    if ((length & 31) > 0)
      add_unit<T, kFormat, 4>(block, sum, fragments, step + 2 * units, 2 * units, rows, words, ranges);
  });
}

// Logits of a stage's 64 tokens, 16 per warp, to `scores` from `token` on.
template <class T, int Kind, class Formats, class Block>
MC_HD void key_logits(Block& block, const KeyStage<Kind, Formats>& stage, const QueryFragments& fragments, float scale,
                      Scores scores, int token) {
  typename Block::template PerThread<FragmentD> total;
  block.each([&](Thread thread) { total(thread) = FragmentD{}; });
  int step = 0;
  stage.each_run([&](int n) {
    const auto length = stage.length(n);
    const char* first = stage.rows(n);
    const int stride = stage.stride(n);
    // Runs without ranges per token add to the total as they are.
    const TokenRanges ranges = stage.token_ranges(n);
    typename Block::template PerThread<FragmentD> sum;
    block.each([&](Thread thread) { sum(thread) = ranges.scales < 0 ? total(thread) : FragmentD{}; });
    auto rows = [&](Thread thread, int half) {
      return first + (own_row(thread) + 8 * half) * stride;
    };
    add_run<T, Formats>(block, sum, fragments, step, stage.run(n).format, length, rows, stage.words(n),
                        stage.channel_ranges(n));
    step += length >> 4;
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4, row = own_row(thread);
      if (ranges.scales < 0) {
        total(thread) = sum(thread);
        return;
      }
      MC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float factor = ranges.scale(row + 8 * half), lowest = ranges.minimum(row + 8 * half);
        MC_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float constant = lowest * fragments.sums[n * kQueryTile + 2 * t + i];
          total(thread).x[2 * half + i] += factor * sum(thread).x[2 * half + i] + constant;
        }
      }
    });
  });
  const TokenRanges norms = stage.norms();
  block.each([&](Thread thread) {
    const int t = thread.lane() % 4, row = own_row(thread);
    MC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float norm = norms.scale(row + 8 * half);
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float logit = norm * total(thread).x[2 * half + i] + fragments.offset[2 * t + i];
        scores(2 * t + i, token + row + 8 * half) = logit * scale;
      }
    }
  });
}

// Logits of retained keys in place of those of their codes. Between two `sync`s.
template <class T, class Block>
MC_HD void exact_logits(Block& block, const ExactRows& exact, const QueryFragments& fragments, int step, float scale,
                        Scores scores, int token) {
  for (int first = 0; first < exact.count; first += kDecodeWarps * 16) {
    typename Block::template PerThread<FragmentD> sum;
    block.each([&](Thread thread) { sum(thread) = FragmentD{}; });
    auto rows = [&](Thread thread, int half) {
      return exact.rows[exact.clamped(first + own_row(thread) + 8 * half)];
    };
    add_run<T, RetainedFormat>(block, sum, fragments, step, exact.reader.shape.retained_format, exact.reader.shape.dim,
                               rows, true, ChannelRanges{});
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4;
      for (int half = 0; half < 2; ++half) {
        const int n = first + own_row(thread) + 8 * half;
        if (n >= exact.count || exact.token(n) < 0) continue;
        for (int i = 0; i < 2; ++i) {
          const float constant = exact.minimum(n) * fragments.sums[kExactRun * kQueryTile + 2 * t + i];
          const float logit = exact.scale(n) * sum(thread).x[2 * half + i] + constant;
          scores(2 * t + i, token + exact.token(n)) = logit * scale;
        }
      }
    });
  }
}

}  // namespace minicache
