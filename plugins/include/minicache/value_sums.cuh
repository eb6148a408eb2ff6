// Weighted sums of compressed values, straight from their codes: components are the rows of a matrix product, tokens
// what it sums over, query heads its columns.
//
// Components go in units of 32, dealt to the warps in turn. A thread with g = lane / 4 reads N = 4 neighbouring
// components of a unit, from N g on: c = 0, 1 are rows g and g + 8 of the unit's first sum, c = 2, 3 of its second. In
// a unit that more than one run shares, N = 2: its halves of 16 components are the first sum and the second.
#pragma once

#include "minicache/stream_stage.cuh"

namespace minicache {

constexpr int kConstants = kRuns + 1;

// Fragments of weights in shared memory, kBlockSize / 16 steps of 16 tokens per run, and what belongs to whole runs.
struct WeightFragments {
  char* data;
  float* parts;   // [kConstants][kDecodeThreads]: a thread's sums of weights times centres; last: of weights
  float* totals;  // [kConstants][kQueryTile]
  // Number, among the constants, of the sum of a known run's weights as rounded, where its codes are read with an offset.
  static constexpr int kOffsets = 1;

  // Fragments of another block's weights.
  MC_HD WeightFragments behind(int bytes) const { return {data + bytes, parts, totals}; }

  template <class E, class T>
  MC_HD FragmentB<E>& at(int n, int step, int lane) const {
    constexpr int kBytes = kWarp * static_cast<int>(sizeof(FragmentB<T>));
    return reinterpret_cast<FragmentB<E>*>(data + (n * (kBlockSize / 16) + step) * kBytes)[lane];
  }
  // Weights of a thread's four tokens, in the type that the run's rows are read as.
  template <class T>
  MC_HD void put(Format format, int n, int step, int lane, const float (&x)[4]) const {
    MC_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (format == Format::model) {
        put_pair(at<T, T>(n, step, lane), j, round_pair<T>(x[2 * j], x[2 * j + 1]));
      } else {
        put_pair(at<Code<T>, T>(n, step, lane), j, round_pair<Code<T>>(x[2 * j], x[2 * j + 1]));
      }
    }
  }
  MC_HD float& part(int n, Thread thread) const { return parts[n * kDecodeThreads + thread.index]; }
  MC_HD float constant(int n, int query) const { return totals[n * kQueryTile + query]; }
};

constexpr int kOwnUnits = kMaxRank / 32 / kDecodeWarps;  // units of a warp: of latent components; of residual ones

// What a thread adds up of the weights it prepares, besides their fragments: of a known run in registers, of others in
// `WeightFragments::parts`.
template <int Kind>
struct WeightSums {
  static constexpr int kUsed = is_known(Kind) ? 1 + WeightFragments::kOffsets : kConstants;  // of the constants
  float own[is_known(Kind) ? kUsed : 1];

  MC_HD void add(const WeightFragments& fragments, int n, Thread thread, float x) {
    if constexpr (is_known(Kind)) {
      own[n] += x;
    } else {
      fragments.part(n, thread) += x;
    }
  }
  // Before the first one, and after the last one.
  MC_HD void clear(const WeightFragments& fragments, Thread thread) {
    if constexpr (is_known(Kind)) {
      for (float& x : own) x = 0.0f;
    } else {
      for (int n = 0; n < kUsed; ++n) fragments.part(n, thread) = 0.0f;
    }
  }
  MC_HD void store(const WeightFragments& fragments, Thread thread) const {
    if constexpr (is_known(Kind)) {
      for (int n = 0; n < kUsed; ++n) fragments.part(n, thread) = own[n];
    }
  }
};

// Weights of a stage's tokens, one step per warp; `token`: place of its first one in `scores`.
template <class T, int Kind, class Formats, class Block>
MC_HD void prepare_weights(Block& block, const ValueStage<Kind, Formats>& stage, Scores scores, int token,
                           const WeightFragments& fragments,
                           typename Block::template PerThread<WeightSums<Kind>>& sums) {
  const TokenRanges norms = stage.norms();
  block.each([&](Thread thread) {
    const int query = thread.lane() / 4, first = 16 * thread.warp() + 2 * (thread.lane() % 4);
    float weight[4], norm[4];
    scores.load(query, token + first, weight);
    if (!Kind) sums(thread).add(fragments, kRuns, thread, sum_of(weight));
    if (norms.scales >= 0) {
      norms.load_scales(first, norm);
      MC_UNROLL
      for (int i = 0; i < 4; ++i) weight[i] *= norm[i];
    }
    stage.each_weighted([&](int n) {
      const TokenRanges ranges = stage.token_ranges(n);
      float scaled[4];
      ranges.load_scales(first, scaled);
      MC_UNROLL
      for (int i = 0; i < 4; ++i) scaled[i] *= weight[i];
      if (ranges.minima >= 0) {
        float minima[4];
        ranges.load_minima(first, minima);
        float constant = stage.centre(n) * sum_of(scaled);
        MC_UNROLL
        for (int i = 0; i < 4; ++i) constant += weight[i] * minima[i];
        sums(thread).add(fragments, n, thread, constant);
      }
      fragments.put<T>(stage.run(n).format, n, thread.warp(), thread.lane(), scaled);
      if (!stage.template offset_codes<T>()) return;
      MC_UNROLL
      for (float& x : scaled) x = to_float(from_float<Code<T>>(x));
      sums(thread).add(fragments, WeightFragments::kOffsets, thread, sum_of(scaled));
    });
  });
}

// Ranges of N components, each twice in a pair: scales, and numbers of centres.
template <class E, int N>
struct ColumnRanges {
  Pair<E> scale[N], minimum[N];

  template <Format F>
  MC_HD void load(const ChannelRanges& stored, int index) {
    spread(stored.scales() + index, scale);
    if constexpr (is_integer(F)) {
      spread(stored.minima() + index, minimum);
      const Pair<E> centre = make_pair<E>(centre_of(F), centre_of(F));
      MC_UNROLL
      for (int c = 0; c < N; ++c) minimum[c] = fused(scale[c], centre, minimum[c]);
    }
  }

 private:
  MC_HD static void spread(const Half* source, Pair<E> (&out)[N]) {
    Pair<Half> x[N / 2];
    read_numbers<N>(source, x);
    MC_UNROLL
    for (int p = 0; p < N / 2; ++p) {
      out[p] = convert<E>(firsts(x[p], x[p]));
      out[p + N / 2] = convert<E>(seconds(x[p], x[p]));
    }
  }
};

// Adds one step of 16 rows to N / 2 sums. Offset: of codes read with one.
template <class T, Format F, int N, bool Offset, class Block, class Rows, class At, class Active, class Weight,
          class Ranges>
MC_HD void add_step(Block& block, typename Block::template PerThread<FragmentD> (&sums)[2], int step, Rows rows, At at,
                    Active active, Weight weight, bool words, bool channel, const Ranges& ranges) {
  using E = Element<T, F>;
  typename Block::template PerThread<FragmentA<E>> values[N / 2];
  typename Block::template PerThread<FragmentB<E>> weights;
  block.each([&](Thread thread) {
    if (!MC_ON_DEVICE && !active(thread)) {  // on a GPU other warps do not get here
      for (int m = 0; m < N / 2; ++m) values[m](thread) = FragmentA<E>{};
      weights(thread) = FragmentB<E>{};
      return;
    }
    weights(thread) = weight(FormatTag<F>{}, step, thread);
    const int chunk = at(thread), first = 2 * (thread.lane() % 4);
    MC_UNROLL
    for (int k = 0; k < 2; ++k) {
      Pair<E> two[N];
      const void *row = rows(thread, step, first + 8 * k), *next = rows(thread, step, first + 8 * k + 1);
      if constexpr (Offset) {
        read_offset_columns(row, next, chunk, two);
      } else {
        read_columns<T, F, N>(row, next, chunk, words, two);
      }
      if constexpr (has_ranges(F) && !Offset) {
        if (channel) {
          MC_UNROLL
          for (int c = 0; c < N; ++c) two[c] = fused(two[c], ranges(thread).scale[c], ranges(thread).minimum[c]);
        }
      }
      MC_UNROLL
      for (int c = 0; c < N; ++c) put_pair(values[c / 2](thread), c % 2 + 2 * k, two[c]);
    }
  });
  MC_UNROLL
  for (int m = 0; m < N / 2; ++m) block.multiply_add(sums[m], values[m], weights);
}

// Adds Steps (0: `steps`) steps of 16 rows to N / 2 sums. `rows(thread, step, k)` is row k of a step; `at(thread)` the
// number of the thread's chunk of N components within the run; warps for which `active(thread)` is false add nothing.
template <class T, Format F, int N, int Steps, bool Offset, class Block, class Rows, class At, class Active,
          class Weight>
MC_HD void add_components(Block& block, typename Block::template PerThread<FragmentD> (&sums)[2], int steps, Rows rows,
                          At at, Active active, Weight weight, bool words, const ChannelRanges& stored) {
  using E = Element<T, F>;
  typename Block::template PerThread<ColumnRanges<Code<T>, N>> ranges;
  const bool channel = has_ranges(F) && !Offset && stored.any;
  if (channel) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int c = 0; c < N; ++c) ranges(thread).minimum[c] = minus_zeros<Code<T>>();
      if (MC_ON_DEVICE || active(thread)) ranges(thread).template load<F>(stored, N * at(thread));
    });
  }
  static_assert(!has_ranges(F) || sizeof(E) == sizeof(Code<T>), "ranges belong to codes");
  // Others would take more registers than there are.
  if constexpr (Steps > 0 && (F == Format::int4 || is_gaussian(F)) && N == 4) {
    MC_UNROLL
    for (int step = 0; step < Steps; ++step) {
      add_step<T, F, N, Offset>(block, sums, step, rows, at, active, weight, words, channel, ranges);
    }
  } else {
    MC_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      add_step<T, F, N, Offset>(block, sums, step, rows, at, active, weight, words, channel, ranges);
    }
  }
}

// One unit per warp of a run of `length` components from number `start` on: `unit(thread)` is its number, from component
// 32 unit on. Steps 0: `steps` of them, of retained vectors.
template <class T, class Formats, int Steps, class Block, class Length, class Rows, class Unit, class Weight>
MC_HD void add_values(Block& block, typename Block::template PerThread<FragmentD> (&sums)[2], int steps, Format format,
                      Length length, int start, Rows rows, Unit unit, Weight weight, bool words,
                      const ChannelRanges& ranges) {
  // Components of the run in front of the unit's half m; a half belongs to the run if that is one of its components.
  auto before = [&](Thread thread, int m) { return 32 * unit(thread) + 16 * m - start; };
  auto has = [&](Thread thread, int m) { return before(thread, m) >= 0 && before(thread, m) < length; };
  auto whole = [&](Thread thread) { return has(thread, 0) && has(thread, 1); };
  auto body = [&](auto tag) {
    constexpr Format kFormat = decltype(tag)::value;
    if (block.any_warp(whole)) {
      auto at = [&](Thread thread) { return (before(thread, 0) >> 2) + thread.lane() / 4; };
      auto add = [&](auto offset) {
        constexpr bool kRead = decltype(offset)::value;
        add_components<T, kFormat, 4, Steps, kRead>(block, sums, steps, rows, at, whole, weight, words, ranges);
      };
      constexpr bool kOffset = !std::is_same_v<Length, int> && kOffsetCodes<T, kFormat>;
      if (kOffset && !ranges.any) {
        add(std::bool_constant<kOffset>{});
      } else {
        add(std::false_type{});
      }
    }
    auto part = [&](Thread thread) { return has(thread, 0) != has(thread, 1); };
    if (!block.any_warp(part)) return;
    typename Block::template PerThread<FragmentD> sum[2];
    block.each([&](Thread thread) { sum[0](thread) = FragmentD{}; });
    auto at = [&](Thread thread) { return (before(thread, has(thread, 1)) >> 1) + thread.lane() / 4; };
    add_components<T, kFormat, 2, Steps, false>(block, sum, steps, rows, at, part, weight, words, ranges);
    block.each([&](Thread thread) {
      if (!part(thread)) return;
      MC_UNROLL
      for (int m = 0; m < 2; ++m) {
        MC_UNROLL
        for (int i = 0; i < 4; ++i) sums[m](thread).x[i] += has(thread, m) ? sum[0](thread).x[i] : 0.0f;
      }
    });
  };
  Formats::with(format, body);
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

}  // namespace minicache
