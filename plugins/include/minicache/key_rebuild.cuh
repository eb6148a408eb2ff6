// Logits of keys stored before RoPE: a warp rebuilds 16 keys of a cache block at a time on the tensor cores, turns them
// by their places in the block, and multiplies with queries turned back by the block's position. Neither leaves the
// chip. Keys at the same places of two blocks share what is read for them: maps and turns.
//
//     q . R(p + r) k = (R(-p) q) . (R(r) k),    k = (nu [y | residual]) [P | A]^T + c
//
// Halves of a key (component i is paired with i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/key_rows.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ((dim + 31) & ~31) >> 1; }

// Steps of 16 components of a turned query.
MC_HD int turned_steps(int dim) { return padded_half(dim) >> 3; }

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
constexpr int kRebuildBlocks = 2;                    // cache blocks of a stage of keys that are rebuilt

struct KeyRebuild {
  const void* map;             // fragments,
  std::int32_t map_in_shared;  // or where they lie in shared memory if they fit there; -1: they do not
  KeyRows rows;                // of streams that are not known
  char* turns;                 // [kBlockSize][padded half / 2] `Turn`s
  float* offset;               // c of the slot by component of the padded key

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
  MC_HD static Turn<E> turn_of(int dim, const float* inverse_frequencies, int place, int n) {
    const Base first = base_of(dim, inverse_frequencies, place, 2 * n);
    const Base second = base_of(dim, inverse_frequencies, place, 2 * n + 1);
    return {make_pair<E>(first.cosine, second.cosine), make_pair<E>(first.sine, second.sine)};
  }

  // Component of the padded key's component d, -1 in the padding.
  MC_HD static int component(int dim, int d) {
    const int half = padded_half(dim), place = d % half;
    return place < dim / 2 ? place + d / half * (dim / 2) : -1;
  }

  // Logits of `blocks` cache blocks of `data`, `block_bytes` apart, to `scores` from `token` on; `first(n)`: step of
  // the fragments from which on the queries lie that are turned back by the position of block n.
  template <class T, int Kind, class Formats, class Block, class First>
  MC_HD void logits(Block& block, const StreamReader& reader, Formats, const char* data, int block_bytes, int blocks,
                    const QueryFragments& queries, First first, float scale, Scores scores, int token) const {
    using Stage = KeyStage<Kind, Formats>;
    if constexpr (Kind == kGeneral) {
      for (int n = 0; n < blocks; ++n) {
        const Stage stages[1] = {{reader, data + n * block_bytes}};
        const int steps[1] = {first(n)};
        tile_logits<T>(block, stages, 1, queries, steps, scale, scores, token + n * kBlockSize);
      }
    } else {
      const int last = blocks - 1;  // stands in for the second block if there is none
      const Stage stages[kRebuildBlocks] = {{reader, data}, {reader, data + last * block_bytes}};
      const int steps[kRebuildBlocks] = {first(0), first(last)};
      tile_logits<T>(block, stages, blocks, queries, steps, scale, scores, token);
    }
  }

 private:
  template <class E, class Block, int Tiles>
  using Rows = typename Block::template PerThread<FragmentA<E>>[Tiles];
  // Of each tile: keys, components 16 n to 16 n + 15 (sums 0 and 1) and those they are paired with (2 and 3).
  template <class Block, int Tiles>
  using Keys = typename Block::template PerThread<FragmentD>[Tiles][4];

  // Logits of a tile of 16 tokens per warp of each of `stages`; those of the first `stored` are stored.
  template <class T, int Kind, class Formats, int Tiles, class Block>
  MC_HD void tile_logits(Block& block, const KeyStage<Kind, Formats> (&stages)[Tiles], int stored,
                         const QueryFragments& queries, const int (&first)[Tiles], float scale, Scores scores,
                         int token) const {
    using E = Code<T>;
    const StreamShape& shape = stages[0].reader.shape;
    const int half = padded_half(shape.dim);
    typename Block::template PerThread<FragmentD> logit[Tiles];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) logit[m](thread) = FragmentD{};
    });
    auto add = [&](auto half, int n, Keys<Block, Tiles>& key) {
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
    };
    if constexpr (is_known(Kind)) {
      Rows<E, Block, Tiles> y[Kind / 16];
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        read_rows<T>(block, stages[m], [&](Thread thread, int step) -> FragmentA<E>& { return y[step][m](thread); });
      }
      rebuild_plain<E, Kind / 16, Tiles>(block, half, Fixed<Kind / 16>{}, y, add);
    } else if constexpr (Kind == kPlain) {
      const int steps = padded_steps(rows.steps);
      Rows<E, Block, Tiles> y[kPlainSteps];
      MC_UNROLL
      for (int m = 0; m < Tiles; ++m) {
        rows.template store<T>(block, stages[m]);
        block.each([&](Thread thread) {
          MC_UNROLL
          for (int step = 0; step < kPlainSteps; ++step) {
            if (step >= steps) break;
            y[step][m](thread) = rows.template row<E>(thread, step);
          }
        });
      }
      rebuild_plain<E, kPlainSteps, Tiles>(block, half, steps, y, add);
    } else {
      rows.template store<T>(block, stages[0]);
      rebuild_any<E>(block, half, rows.steps, add);
    }
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

  // Number of the eight components that sum i of step n is of.
  MC_HD static int tile_of(int n, int half, int i) { return 2 * n + i / 2 * (half >> 3) + i % 2; }

  // c, to which the products with the map are added.
  template <class Block>
  MC_HD void load_offset(Block& block, int n, int half, Keys<Block, 1>& c) const {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const auto x = detail::load<Neighbours<float, 2>>(offset + 8 * tile_of(n, half, i) + 2 * (thread.lane() % 4));
        c[0][i](thread) = FragmentD{{x.x[0], x.x[1], x.x[0], x.x[1]}};
      }
    });
  }

  // `steps`: an even number, at most Most. Calls `add(half, n, keys)` for each step n of half a padded key.
  template <class E, int Most, int Tiles, class Block, class Half, class Steps, class F>
  MC_HD void rebuild_step(Block& block, Half half, int n, Steps steps, const FragmentPair<E>* map,
                          const Rows<E, Block, Tiles> (&y)[Most], F add) const {
    Keys<Block, 1> c;
    Keys<Block, Tiles> key;
    load_offset(block, n, half, c);
    MC_UNROLL
    for (int step = 0; step < Most; step += 2) {
      if (step >= steps) break;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int place = rebuild_fragment(true, steps, tile_of(n, half, i), step, 0) / 2;
        typename Block::template PerThread<FragmentB<E>> part[2];
        block.each([&](Thread thread) {
          const FragmentPair<E> both = map[place + thread.lane()];
          part[0](thread) = both.step[0];
          part[1](thread) = both.step[1];
        });
        MC_UNROLL
        for (int m = 0; m < Tiles; ++m)
          block.multiply_add(key[m][i], y[step][m], part[0], step == 0 ? c[0][i] : key[m][i]);
        MC_UNROLL
        for (int m = 0; m < Tiles; ++m) block.multiply_add(key[m][i], y[step + 1][m], part[1]);
      }
    }
    add(half, n, key);
  }

  template <class E, int Most, int Tiles, class Block, class Steps, class F>
  MC_HD void rebuild_plain(Block& block, int half, Steps steps, const Rows<E, Block, Tiles> (&y)[Most], F add) const {
    // Twice, so that the compiler knows which memory it is; and once for the usual half.
    constexpr int kUsual = 64;
    auto rebuild = [&](const FragmentPair<E>* parts) {
      MC_NO_UNROLL
      for (int n = 0; n < half / 16; ++n) rebuild_step<E, Most, Tiles>(block, half, n, steps, parts, y, add);
    };
    if (map_in_shared < 0) return rebuild(static_cast<const FragmentPair<E>*>(map));
    const auto* const parts = reinterpret_cast<const FragmentPair<E>*>(block.shared + map_in_shared);
    if (half != kUsual) return rebuild(parts);
    MC_UNROLL
    for (int n = 0; n < kUsual / 16; ++n) {
      rebuild_step<E, Most, Tiles>(block, Fixed<kUsual>{}, n, steps, parts, y, add);
    }
  }

  template <class E, class Block, class F>
  MC_HD void rebuild_any(Block& block, int half, int steps, F add) const {
    const auto* const parts =
        static_cast<const FragmentB<E>*>(map_in_shared >= 0 ? block.shared + map_in_shared : map);
    for (int n = 0; n < half / 16; ++n) {
      Keys<Block, 1> key;
      load_offset(block, n, half, key);
      for (int step = 0; step < steps; ++step) {
        typename Block::template PerThread<FragmentA<E>> y;
        block.each([&](Thread thread) { y(thread) = rows.template row<E>(thread, step); });
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          typename Block::template PerThread<FragmentB<E>> part;
          block.each([&](Thread thread) {
            part(thread) =
                parts[rebuild_fragment(false, padded_steps(steps), tile_of(n, half, i), step, thread.lane())];
          });
          block.multiply_add(key[0][i], y, part);
        }
      }
      add(half, n, key);
    }
  }

  // Keys as they come out of the product, turned by their places, become fragments A of the next one: columns 8 n + 2 t
  // + i are its k. Pair i of step n's.
  template <class T, int Tiles, class Block>
  MC_HD void turn_keys(Thread thread, int dim, int n, int i, const Keys<Block, Tiles>& key,
                       Rows<Code<T>, Block, Tiles>& low, Rows<Code<T>, Block, Tiles>& high) const {
    using E = Code<T>;
    const int j = i % 2, k = i / 2, t = thread.lane() % 4;
    const Turn<E> by = turn<E>(dim, own_row(thread) + 8 * j, 8 * n + 4 * k + t);
    const Pair<E> zero = minus_zeros<E>();
    MC_UNROLL
    for (int m = 0; m < Tiles; ++m) {
      const FragmentD &first = key[m][k](thread), &second = key[m][k + 2](thread);
      const Pair<E> a = round_pair<E>(first.x[2 * j], first.x[2 * j + 1]);
      const Pair<E> b = round_pair<E>(second.x[2 * j], second.x[2 * j + 1]);
      put_pair(low[m](thread), i, fused(a, by.cosine, negated(fused(b, by.sine, zero))));
      put_pair(high[m](thread), i, fused(b, by.cosine, fused(a, by.sine, zero)));
    }
  }
};

}  // namespace minicache
