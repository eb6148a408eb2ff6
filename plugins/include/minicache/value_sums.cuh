// Weighted sums of compressed values, straight from their codes: components are the rows of a matrix product, tokens
// what it sums over, query heads its columns.
//
// Components go in units of 32, dealt to the warps in turn. A thread with g = lane / 4 reads N = 4 neighbouring
// components of a unit, from N g on: c = 0, 1 are rows g and g + 8 of the unit's first sum, c = 2, 3 of its second. In a
// unit that more than one run shares, N = 2: its halves of 16 components are the first sum and the second.
#pragma once

#include "minicache/stream_stage.cuh"

namespace minicache {

// Fragments of weights in shared memory, kBlockSize / 16 steps of 16 tokens per run, and what belongs to whole runs.
struct WeightFragments {
  char* data;
  float* constants;  // [kRuns + 1][kDecodeWarps][kQueryTile]: sums of weights times minima; last: of weights

  template <class E, class T>
  MC_HD FragmentB<E>& at(int n, int step, int lane) const {
    constexpr int kBytes = kWarp * static_cast<int>(sizeof(FragmentB<T>));
    return reinterpret_cast<FragmentB<E>*>(data + (n * (kBlockSize / 16) + step) * kBytes)[lane];
  }
  MC_HD float constant(int n, int query) const {
    float sum = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) sum += constants[(n * kDecodeWarps + w) * kQueryTile + query];
    return sum;
  }
};

// What a thread sums up over the stages: weights times minima per run, and weights.
struct Constants {
  float x[kRuns + 1];
};

constexpr int kOwnUnits = kMaxRank / 32 / kDecodeWarps;  // units of a warp: latent components, and as many residual ones

// Weights of a stage's tokens, one step per warp; `token`: place of its first one in `scores`.
template <class T, class Block>
MC_HD void prepare_weights(Block& block, const Stage& stage, Scores scores, int token, const WeightFragments& fragments,
                           typename Block::template PerThread<Constants>& constants) {
  block.each([&](Thread thread) {
    const int query = thread.lane() / 4, first = 16 * thread.warp() + 2 * (thread.lane() % 4);
    float weight[4];
    MC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int t = first + i % 2 + 8 * (i / 2);
      const float p = scores(query, token + t);
      constants(thread).x[kRuns] += p;
      weight[i] = p * stage.norm(t);
    }
    MC_UNROLL
    for (int n = 0; n <= kResidualRun; ++n) {
      if (!stage.reader.has_run(n)) continue;
      float scaled[4];
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int t = first + i % 2 + 8 * (i / 2);
        scaled[i] = weight[i] * stage.scale(n, t);
        constants(thread).x[n] += weight[i] * stage.minimum(n, t);
      }
      MC_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (stage.reader.run(n).format == Format::model) {
          put_pair(fragments.at<T, T>(n, thread.warp(), thread.lane()), j, make_pair<T>(scaled[2 * j], scaled[2 * j + 1]));
        } else {
          using E = Code<T>;
          put_pair(fragments.at<E, T>(n, thread.warp(), thread.lane()), j, make_pair<E>(scaled[2 * j], scaled[2 * j + 1]));
        }
      }
    }
  });
}

// Adds `steps` steps of 16 rows to N / 2 sums. `rows(step, k)` is row k of a step; `at(thread)` the thread's first
// component within the run; warps for which `active(thread)` is false add nothing.
template <class T, Format F, int N, class Block, class Rows, class At, class Active, class Weight>
MC_HD void add_components(Block& block, typename Block::template PerThread<FragmentD> (&sums)[2], int steps, Rows rows,
                          At at, Active active, Weight weight, bool words, const Half* scales, const Half* minima) {
  using E = Element<T, F>;
  for (int step = 0; step < steps; ++step) {
    typename Block::template PerThread<FragmentA<E>> values[N / 2];
    typename Block::template PerThread<FragmentB<E>> weights;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int m = 0; m < N / 2; ++m) values[m](thread) = FragmentA<E>{};
      weights(thread) = FragmentB<E>{};
      if (!active(thread)) return;
      weights(thread) = weight(FormatTag<F>{}, step, thread);
      const int index = at(thread), first = 2 * (thread.lane() % 4);
      Pair<E> x[4][N / 2];
      MC_UNROLL
      for (int i = 0; i < 4; ++i) read_run<T, F, N>(rows(step, first + i % 2 + 8 * (i / 2)), index, words, x[i]);
      Pair<Half> scale[N / 2] = {}, lowest[N / 2] = {};
      if constexpr (has_ranges(F)) {
        if (scales != nullptr) {
          read_numbers<N>(scales + index, scale);
          if constexpr (is_integer(F)) read_numbers<N>(minima + index, lowest);
        }
      }
      MC_UNROLL
      for (int c = 0; c < N; ++c) {
        const int p = c % (N / 2);
        MC_UNROLL
        for (int k = 0; k < 2; ++k) {
          const Pair<E> a = x[2 * k][p], b = x[2 * k + 1][p];
          Pair<E> two = c < N / 2 ? firsts(a, b) : seconds(a, b);
          if constexpr (has_ranges(F)) {
            if (scales != nullptr) {
              const Pair<E> s = convert<E>(scale[p]);
              Pair<E> constant = make_pair<E>(-0.0f, -0.0f);
              if constexpr (is_integer(F)) {
                const Pair<E> m = convert<E>(lowest[p]);
                constant = c < N / 2 ? firsts(m, m) : seconds(m, m);
              }
              two = fused(two, c < N / 2 ? firsts(s, s) : seconds(s, s), constant);
            }
          }
          put_pair(values[c / 2](thread), c % 2 + 2 * k, two);
        }
      }
    });
    MC_UNROLL
    for (int m = 0; m < N / 2; ++m) block.multiply_add(sums[m], values[m], weights);
  }
}

// One unit per warp of a run whose first component is number `start`: `unit(thread)` is its number, from component
// 32 unit on; `limit`: components in all.
template <class T, class Block, class Rows, class Unit, class Weight>
MC_HD void add_values(Block& block, typename Block::template PerThread<FragmentD> (&sums)[2], int steps,
                      const Segment& run, int start, Rows rows, Unit unit, Weight weight, bool words,
                      const Half* params) {
  const Half* scales = params == nullptr ? nullptr : params + run.scale;
  const Half* minima = params == nullptr ? nullptr : params + run.minimum;
  // Components of the run in front of the unit's half m; a half belongs to the run if that is one of its components.
  auto before = [&](Thread thread, int m) { return 32 * unit(thread) + 16 * m - start; };
  auto has = [&](Thread thread, int m) { return before(thread, m) >= 0 && before(thread, m) < run.length; };
  auto whole = [&](Thread thread) { return has(thread, 0) && has(thread, 1); };
  with_format(run.format, [&](auto tag) {
    constexpr Format kFormat = decltype(tag)::value;
    if (block.any_warp(whole)) {
      auto at = [&](Thread thread) { return before(thread, 0) + 4 * (thread.lane() / 4); };
      add_components<T, kFormat, 4>(block, sums, steps, rows, at, whole, weight, words, scales, minima);
    }
    auto part = [&](Thread thread) { return has(thread, 0) != has(thread, 1); };
    if (!block.any_warp(part)) return;
    typename Block::template PerThread<FragmentD> sum[2];
    block.each([&](Thread thread) { sum[0](thread) = FragmentD{}; });
    auto at = [&](Thread thread) { return before(thread, has(thread, 1)) + 2 * (thread.lane() / 4); };
    add_components<T, kFormat, 2>(block, sum, steps, rows, at, part, weight, words, scales, minima);
    block.each([&](Thread thread) {
      if (!part(thread)) return;
      MC_UNROLL
      for (int m = 0; m < 2; ++m) {
        MC_UNROLL
        for (int i = 0; i < 4; ++i) sums[m](thread).x[i] += has(thread, m) ? sum[0](thread).x[i] : 0.0f;
      }
    });
  });
}

// Component of row lane / 4 + 8 j of sum m of unit `unit`; `shared_unit`: more than one run has components in it.
MC_HD int unit_component(int unit, bool shared_unit, int m, int lane, int j) {
  return shared_unit ? 32 * unit + 16 * m + 2 * (lane / 4) + j : 32 * unit + 4 * (lane / 4) + 2 * m + j;
}

// Number of the run that stored component `component` belongs to.
MC_HD int run_of(const StreamShape& shape, int component) {
  int result = 0;
  for (int n = 0; n < shape.segments; ++n) {
    if (shape.segment[n].format != Format::drop && shape.segment[n].stored <= component) result = n;
  }
  return result;
}

// Whether unit `unit` of `components` is shared, or ends before its second half.
MC_HD bool is_shared(const StreamShape& shape, int unit, int components) {
  if (32 * unit + 16 >= components) return true;
  return run_of(shape, 32 * unit) != run_of(shape, 32 * unit + 16);
}

}  // namespace minicache
