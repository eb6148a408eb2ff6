// Logits of compressed keys of a known run: as key_logits.cuh has it, but queries and what belongs to them stay in
// registers.
//
// A thread with t = lane % 4 reads N = Kind / 4 neighbouring components of a row, from N t on, at once: N / 8 words of
// 4-bit codes. A word, unit n of the row, makes two steps of 16 components: step 2 n + s takes its pairs 2 s and 2 s + 1.
#pragma once

#include "minicache/key_logits.cuh"

namespace minicache {

template <int Kind>
struct alignas(Kind / 8) RowWords {
  static_assert(kKnownBits == 4, "eight codes in a word");
  static constexpr int kWords = Kind / 32;
  std::uint32_t word[kWords];

  // Of row lane / 4 + 8 half of the warp's tile.
  template <class Formats>
  MC_HD static RowWords load(Thread thread, const KeyStage<Kind, Formats>& stage, int half) {
    const int row = own_row(thread) + 8 * half;
    return detail::load<RowWords>(stage.rows(0) + row * known_bytes(Kind) +
                                  thread.lane() % 4 * static_cast<int>(sizeof(RowWords)));
  }
  MC_HD static int first_component(int unit, int lane) { return lane % 4 * (Kind / 4) + 8 * unit; }
};

// As `QueryFragments::component`.
MC_HD int known_component(int length, int step, int lane, int j, int i) {
  return lane % 4 * (length / 4) + 8 * (step / 2) + 2 * (step % 2) + j + 4 * i;
}

// Unit n of two rows as fragments A. Offset: of codes read with one.
template <class T, Format F, bool Offset, int Kind>
MC_HD void read_known_unit(Thread thread, const RowWords<Kind> (&rows)[2], int n, const ChannelRanges& ranges,
                           FragmentA<Code<T>> (&keys)[2]) {
  Pair<Code<T>> x[2][4];
  MC_UNROLL
  for (int half = 0; half < 2; ++half) {
    if constexpr (Offset) {
      read_offset_word(rows[half].word[n], x[half]);
    } else {
      read_word<T, F>(rows[half].word[n], x[half]);
    }
  }
  if constexpr (has_ranges(F) && !Offset) {
    apply_ranges<F>(ranges, RowWords<Kind>::first_component(n, thread.lane()), x);
  }
  put_rows(x, keys);
}

// Mapped queries as fragments, and what logits take from the queries of the thread's columns besides.
template <class T, int Kind, class Block>
struct KnownQueries {
  using E = Code<T>;
  static constexpr int kUnits = Kind / 32;

  struct Constants {
    // Sum of a query's components as rounded; what the offset of codes adds to the products, where they are read with
    // one; the query's product with c, times the scale.
    float sum[2], codes[2], offset[2];
  };
  typename Block::template PerThread<FragmentPair<E>> pair[kUnits];
  typename Block::template PerThread<Constants> constants;

  // `numbers(query, component, x)` reads eight of a query's components; `shared` has room for the fragments of all
  // units. Codes are read with an offset where `codes` says so: components of every second pair are then divided by its
  // step.
  template <class F, class Offset>
  MC_HD void prepare(Block& block, char* shared, bool codes, F numbers, Offset offset) {
    auto* const all = reinterpret_cast<FragmentPair<E>*>(shared);
    block.each([&](Thread thread) {
      if (thread.warp() >= kUnits) return;
      float x[8];
      numbers(thread.lane() / 4, RowWords<Kind>::first_component(thread.warp(), thread.lane()), x);
      FragmentPair<E> result;
      MC_UNROLL
      for (int p = 0; p < 4; ++p) {
        const float unit = codes && p % 2 == 1 ? 1.0f / kOffsetStep : 1.0f;
        put_pair(result.step[p / 2], p % 2, make_pair<E>(x[p] * unit, x[p + 4] * unit));
      }
      all[thread.index] = result;
    });
    block.sync();
    // Sums over all components come from products with rows of ones.
    typename Block::template PerThread<FragmentA<E>> ones, plain;
    typename Block::template PerThread<FragmentD> sum, total;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float unit = codes && j / 2 == 1 ? kOffsetStep : 1.0f;
        put_pair(ones(thread), j, make_pair<E>(unit, unit));
        put_pair(plain(thread), j, make_pair<E>(kCodeOffset, kCodeOffset));
      }
      sum(thread) = total(thread) = FragmentD{};
    });
    MC_UNROLL
    for (int n = 0; n < kUnits; ++n) {
      block.each([&](Thread thread) { pair[n](thread) = all[n * kWarp + thread.lane()]; });
      MC_UNROLL
      for (int s = 0; s < 2; ++s) {
        add(block, sum, ones, n, s);
        if (codes) add(block, total, plain, n, s);
      }
    }
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        constants(thread).sum[i] = sum(thread).x[i];
        constants(thread).codes[i] = total(thread).x[i];
        constants(thread).offset[i] = offset(2 * (thread.lane() % 4) + i);
      }
    });
  }

  // Adds products of rows with step s of unit n.
  MC_HD void add(Block& block, typename Block::template PerThread<FragmentD>& sum,
                 const typename Block::template PerThread<FragmentA<E>>& rows, int n, int s) const {
    typename Block::template PerThread<FragmentB<E>> query;
    block.each([&](Thread thread) { query(thread) = pair[n](thread).step[s]; });
    block.multiply_add(sum, rows, query);
  }
};

// Logits of a stage's 64 tokens, 16 per warp, to `scores` from `token` on.
template <class T, int Kind, class Formats, class Block>
MC_HD void known_logits(Block& block, const KeyStage<Kind, Formats>& stage, const KnownQueries<T, Kind, Block>& queries,
                        float scale, Scores scores, int token) {
  typename Block::template PerThread<FragmentD> sum;
  auto add = [&](auto offset) {
    typename Block::template PerThread<RowWords<Kind>> rows[2];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int half = 0; half < 2; ++half) rows[half](thread) = RowWords<Kind>::load(thread, stage, half);
      MC_UNROLL
      for (int i = 0; i < 4; ++i) sum(thread).x[i] = -queries.constants(thread).codes[i % 2];
    });
    MC_UNROLL
    for (int n = 0; n < queries.kUnits; ++n) {
      typename Block::template PerThread<FragmentA<Code<T>>> keys[2];
      block.each([&](Thread thread) {
        const RowWords<Kind> own[2] = {rows[0](thread), rows[1](thread)};
        FragmentA<Code<T>> unit[2];
        read_known_unit<T, Formats::format, decltype(offset)::value>(thread, own, n, stage.channel_ranges(0), unit);
        keys[0](thread) = unit[0];
        keys[1](thread) = unit[1];
      });
      queries.add(block, sum, keys[0], n, 0);
      queries.add(block, sum, keys[1], n, 1);
    }
  };
  constexpr bool kOffset = kOffsetCodes<T, Formats::format>;
  if (kOffset && stage.template offset_codes<T>()) {
    add(std::bool_constant<kOffset>{});
  } else {
    add(std::false_type{});
  }
  const TokenRanges ranges = stage.token_ranges(0), norms = stage.norms();
  block.each([&](Thread thread) {
    const auto& own = queries.constants(thread);
    const int row = own_row(thread), query = 2 * (thread.lane() % 4);
    MC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float norm = scale * norms.scale(row + 8 * half);
      const float factor = norm * ranges.scale(row + 8 * half), lowest = norm * ranges.minimum(row + 8 * half);
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float constant = ranges.minima < 0 ? own.offset[i] : lowest * own.sum[i] + own.offset[i];
        scores(query + i, token + row + 8 * half) = factor * sum(thread).x[2 * half + i] + constant;
      }
    }
  });
}

}  // namespace minicache
