// Logits of keys stored before RoPE: rebuilt, turned by their places in the cache block, and multiplied with queries
// turned back by the block's position. Neither leaves the chip. Keys at the same places of two blocks share turns, too.
//
//     q . R(p + r) k = (R(-p) q) . (R(r) k)
#pragma once

#include "minicache/row_rebuild.cuh"

namespace minicache {

// Steps of 16 components of a turned query.
MC_HD int turned_steps(int dim) { return padded_half(dim) >> 3; }

// Cosines and sines of the angles of components 2 n and 2 n + 1 of half a vector.
template <class E>
struct alignas(2 * sizeof(Pair<E>)) TurnPair {
  Pair<E> cosine, sine;

  // A pair of components and the one it is paired with, turned.
  MC_HD void apply(Pair<E>& a, Pair<E>& b) const {
    const Pair<E> zero = minus_zeros<E>(), first = a;
    a = fused(a, cosine, negated(fused(b, sine, zero)));
    b = fused(b, cosine, fused(first, sine, zero));
  }
};
struct KeyRebuild {
  RowRebuild keys;
  const char* turns;  // [kBlockSize] rows of `turn_stride` bytes: [padded half / 2] `TurnPair`s

  // Cosine and sine of a cache block's position, for one component of half a padded key.
  struct Base {
    float cosine, sine;
  };
  // 8 banks further per place: a warp that reads neighbouring places and components meets no conflict.
  template <class E>
  MC_HD static int turn_stride(int dim) {
    return padded_half(dim) / 2 * static_cast<int>(sizeof(TurnPair<E>)) + 32;
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

  // Of component c at a position; in the padding no turn.
  MC_HD static Base base_of(int dim, const float* inverse_frequencies, int position, int c) {
    Base base{1.0f, 0.0f};
    if (c < dim / 2) {
      sine_and_cosine(multiply(static_cast<float>(position), inverse_frequencies[c]), base.sine, base.cosine);
    }
    return base;
  }

  // Number n of the table's entry for a place.
  template <class E>
  MC_HD static TurnPair<E> turn_of(int dim, const float* inverse_frequencies, int place, int n) {
    const Base first = base_of(dim, inverse_frequencies, place, 2 * n);
    const Base second = base_of(dim, inverse_frequencies, place, 2 * n + 1);
    return {make_pair<E>(first.cosine, second.cosine), make_pair<E>(first.sine, second.sine)};
  }

  // Logits of `blocks` cache blocks of `data`, `block_bytes` apart, to `scores` from `token` on; `first(n)`: step of
  // the fragments from which on the queries lie that are turned back by the position of block n.
  template <class T, int Kind, class Formats, class Block, class First>
  MC_HD void logits(Block& block, const StreamReader& reader, Formats, const char* data, int block_bytes, int blocks,
                    const QueryFragments& queries, First first, float scale, Scores scores, int token) const {
    using Stage = KeyStage<Kind, Formats>;
    if constexpr (rebuilt_blocks(Kind) == 1) {
      const Stage stages[1] = {{reader, data}};
      const int steps[1] = {first(0)};
      tile_logits<T>(block, stages, 1, queries, steps, scale, scores, token);
    } else {
      const int last = blocks - 1;  // stands in for the second block if there is none
      const Stage stages[2] = {{reader, data}, {reader, data + last * block_bytes}};
      const int steps[2] = {first(0), first(last)};
      tile_logits<T>(block, stages, blocks, queries, steps, scale, scores, token);
    }
  }

 private:
  template <class E, class Block, int Tiles>
  using Rows = typename Block::template PerThread<FragmentA<E>>[Tiles];

  // Logits of a tile of 16 tokens per warp of each of `stages`; those of the first `stored` are stored.
  template <class T, int Kind, class Formats, int Tiles, class Block>
  MC_HD void tile_logits(Block& block, const KeyStage<Kind, Formats> (&stages)[Tiles], int stored,
                         const QueryFragments& queries, const int (&first)[Tiles], float scale, Scores scores,
                         int token) const {
    using E = Code<T>;
    typename Block::template PerThread<FragmentD> logit[Tiles];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) logit[m](thread) = FragmentD{};
    });
    keys.template each_step<T>(block, stages, [&](auto half, int n, RebuiltStep<Block, Tiles>& key) {
      Rows<E, Block, Tiles> low, high;
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int i = 0; i < 4; ++i) turn_keys<T, Tiles, Block>(thread, 2 * half, n, i, key, low, high);
      });
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        multiply_queries<T>(block, logit[m], low[m], queries, first[m] + n);
        multiply_queries<T>(block, logit[m], high[m], queries, first[m] + half / 16 + n);
      }
    });
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4, row = own_row(thread);
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        if (m >= stored) break;
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          scores(2 * t + i % 2, token + m * kBlockSize + row + 8 * (i / 2)) = logit[m](thread).x[i] * scale;
        }
      }
    });
  }

  template <class T, class Block, class Turned>
  MC_HD static void multiply_queries(Block& block, typename Block::template PerThread<FragmentD>& logit,
                                     const Turned& turned, const QueryFragments& queries, int step) {
    using E = Code<T>;
    typename Block::template PerThread<FragmentB<E>> query;
    block.each([&](Thread thread) { query(thread) = queries.at<E, T>(step, thread.lane()); });
    block.multiply_add(logit, turned, query);
  }

  // Keys as they come out of the product, turned by their places, become fragments A of the next one: columns 8 n + 2 t
  // + i are its k. Pair i of step n's.
  template <class T, int Tiles, class Block>
  MC_HD void turn_keys(Thread thread, int dim, int n, int i, const RebuiltStep<Block, Tiles>& key,
                       Rows<Code<T>, Block, Tiles>& low, Rows<Code<T>, Block, Tiles>& high) const {
    using E = Code<T>;
    const int j = i % 2, k = i / 2;
    const char* const row = turns + (own_row(thread) + 8 * j) * turn_stride<E>(dim);
    const auto by = detail::load<TurnPair<E>>(row + (8 * n + 4 * k + thread.lane() % 4) * sizeof(TurnPair<E>));
    MC_UNROLL
    for (int m = 0; m < Tiles; ++m) {
      const FragmentD &first = key[m][k](thread), &second = key[m][k + 2](thread);
      Pair<E> a = round_pair<E>(first.x[2 * j], first.x[2 * j + 1]);
      Pair<E> b = round_pair<E>(second.x[2 * j], second.x[2 * j + 1]);
      by.apply(a, b);
      put_pair(low[m](thread), i, a);
      put_pair(high[m](thread), i, b);
    }
  }
};

}  // namespace minicache
