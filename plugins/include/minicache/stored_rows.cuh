// Stored rows of a warp's 16 tokens as numbers: [y | residual] with ranges and norms applied, as fragments A.
#pragma once

#include "minicache/known_logits.cuh"

namespace minicache {

// Steps of 16 components of [y | residual].
MC_HD int rebuild_steps(const StreamShape& shape) {
  return (shape.stored + (shape.has_residual() ? shape.dim : 0)) >> 4;
}

// Steps of [y | residual] with one of zeros behind an odd number of them.
MC_HD constexpr int padded_steps(int steps) { return (steps + 1) & ~1; }

struct RowNorms {
  float x[2];
  bool any;  // of all rows alike
  MC_HD static RowNorms of(const TokenRanges& norms, int row) {
    return {{norms.scale(row), norms.scale(row + 8)}, norms.scales >= 0};
  }
};

// What the numbers of the thread's rows, lane / 4 and lane / 4 + 8 of the warp's tile, are multiplied with, and what is
// added: ranges of the tokens, then norms. Products of both are not rounded: their error would be that of all of a
// row's numbers, which maps add up.
template <class E>
struct RowRanges {
  Pair<E> scale[2], minimum[2], norm[2];
  bool normed;

  // `integer`: whether there may be minima.
  MC_HD static RowRanges of(const TokenRanges& ranges, const RowNorms& norms, int row, bool integer) {
    RowRanges result{};
    result.normed = norms.any;
    MC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float scale = ranges.scale(row + 8 * j), lowest = ranges.minimum(row + 8 * j);
      result.norm[j] = round_pair<E>(norms.x[j], norms.x[j]);
      result.scale[j] = round_pair<E>(scale, scale);
      result.minimum[j] = integer ? round_pair<E>(lowest, lowest) : minus_zeros<E>();
    }
    return result;
  }
  template <Format F>
  MC_HD FragmentA<E> apply(const FragmentA<E>& unit) const {
    const Pair<E> zeros[2] = {minus_zeros<E>(), minus_zeros<E>()};
    FragmentA<E> result = unit;
    if constexpr (has_ranges(F)) result = applied(result, scale, is_integer(F) ? minimum : zeros);
    if (!has_ranges(F) || normed) result = applied(result, norm, zeros);
    return result;
  }

 private:
  MC_HD static FragmentA<E> applied(const FragmentA<E>& x, const Pair<E> (&factor)[2], const Pair<E> (&constant)[2]) {
    FragmentA<E> result;
    MC_UNROLL
    for (int j = 0; j < 4; ++j) put_pair(result, j, fused(pair_of(x, j), factor[j % 2], constant[j % 2]));
    return result;
  }
};

// Unit number `number` of 4 N components of run n of the warp's 16 tokens, as numbers: N / 4 fragments A.
template <class T, Format F, int N, int Kind, class Formats>
MC_HD void dequantize(Thread thread, const KeyStage<Kind, Formats>& stage, const RowNorms& norms,
                      const RowRanges<Code<T>>& ranges, int n, int number, FragmentA<Code<T>> (&out)[2]) {
  using E = Code<T>;
  const char* const base = stage.rows(n);
  const int own = own_row(thread), stride = stage.stride(n);
  auto rows = [&](Thread, int half) { return base + (own + 8 * half) * stride; };
  FragmentA<Element<T, F>> unit[N / 4];
  read_unit<T, F, N>(thread, number, rows, stage.words(n), stage.channel_ranges(n), unit);
  MC_UNROLL
  for (int s = 0; s < N / 4; ++s) {
    if constexpr (std::is_same_v<Element<T, F>, E>) {
      out[s] = ranges.template apply<F>(unit[s]);
    } else {
      MC_UNROLL
      for (int j = 0; j < 4; ++j) {
        const auto x = pair_of(unit[s], j);
        put_pair(out[s], j, round_pair<E>(norms.x[j % 2] * first_of(x), norms.x[j % 2] * second_of(x)));
      }
    }
  }
}

// Rows of the warp's 16 tokens of a known run, components in the order of `known_component`; `y(thread, step)` takes
// them.
template <class T, int Kind, class Formats, class Block, class Y>
MC_HD void read_rows(Block& block, const KeyStage<Kind, Formats>& stage, Y y) {
  block.each([&](Thread thread) {
    const int row = own_row(thread);
    const auto norms = RowNorms::of(stage.norms(), row);
    const auto ranges = RowRanges<Code<T>>::of(stage.token_ranges(0), norms, row, is_integer(Formats::format));
    const RowWords<Kind> rows[2] = {RowWords<Kind>::load(thread, stage, 0), RowWords<Kind>::load(thread, stage, 1)};
    MC_UNROLL
    for (int n = 0; n < RowWords<Kind>::kWords; ++n) {
      FragmentA<Code<T>> unit[2];
      read_known_unit<T, Formats::format, false>(thread, rows, n, stage.channel_ranges(0), unit);
      y(thread, 2 * n) = ranges.template apply<Formats::format>(unit[0]);
      y(thread, 2 * n + 1) = ranges.template apply<Formats::format>(unit[1]);
    }
  });
}

// Rows of a plain stream in shared memory, run by run, components in the order of `QueryFragments::component`:
// [kDecodeWarps] [steps][lanes] fragments that only their own threads use. The last of an odd number of steps is
// followed by zeros.
struct StoredRows {
  char* data;
  std::int32_t steps;

  template <class T>
  MC_HD static int bytes(const StreamShape& shape) {
    return kDecodeThreads * padded_steps(rebuild_steps(shape)) * static_cast<int>(sizeof(FragmentA<Code<T>>));
  }
  template <class E>
  MC_HD void pad(Thread thread) const {
    if (steps % 2 == 1) row<E>(thread, steps) = {};
  }
  template <class E>
  MC_HD FragmentA<E>& row(Thread thread, int step) const {
    return reinterpret_cast<FragmentA<E>*>(data)[(thread.warp() * padded_steps(steps) + step) * kWarp + thread.lane()];
  }

  template <class T, int Kind, class Formats, class Block>
  MC_HD void store(Block& block, const KeyStage<Kind, Formats>& stage) const {
    using E = Code<T>;
    typename Block::template PerThread<RowNorms> norms;
    block.each([&](Thread thread) { norms(thread) = RowNorms::of(stage.norms(), own_row(thread)); });
    stage.each_run([&](int n) {
      const int units = stage.length(n) >> 5, rest = stage.length(n) & 31;
      const int first = stage.run(n).stored >> 4;
      Formats::with(stage.run(n).format, [&](auto tag) {
        constexpr Format kFormat = decltype(tag)::value;
        block.each([&](Thread thread) {
          const bool integer = is_integer(kFormat);
          const auto ranges = RowRanges<E>::of(stage.token_ranges(n), norms(thread), own_row(thread), integer);
          FragmentA<E>* const to = &row<E>(thread, first);  // steps are a warp apart
          FragmentA<E> unit[2];
          MC_NO_UNROLL
          for (int u = 0; u < units; ++u) {
            dequantize<T, kFormat, 8>(thread, stage, norms(thread), ranges, n, u, unit);
            to[2 * u * kWarp] = unit[0];
            to[(2 * u + 1) * kWarp] = unit[1];
          }
          if (rest == 0) return;
          dequantize<T, kFormat, 4>(thread, stage, norms(thread), ranges, n, 2 * units, unit);
          to[2 * units * kWarp] = unit[0];
        });
      });
    });
  }
};

}  // namespace minicache
