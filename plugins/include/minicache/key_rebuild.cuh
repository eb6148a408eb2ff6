// Logits of keys stored before RoPE: a warp rebuilds 16 keys at a time on the tensor cores, turns them by their places in
// the cache block, and multiplies with queries turned back by the block's position. Neither leaves the chip.
//
//     q . R(p + r) k = (R(-p) q) . (R(r) k),    k = (nu [y | residual]) [P | A]^T + c
//
// Halves of a key (component i is paired with i + D / 2) are padded to a multiple of 16 components each.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/key_rows.cuh"

namespace minicache {

MC_HD int padded_half(int dim) { return ceil_div(dim / 2, 16) * 16; }

// Steps of 16 components of a turned query.
MC_HD int turned_steps(int dim) { return 2 * padded_half(dim) / 16; }

// Steps of [y | residual] with one of zeros behind an odd number of them.
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
      rows.template store<T>(block, stage, steps);
      if constexpr (Kind == kPlain) {
        typename Block::template PerThread<FragmentA<E>> y[kPlainSteps];
        block.each([&](Thread thread) {
          MC_UNROLL
          for (int step = 0; step < kPlainSteps; ++step) {
            if (step < padded_steps(steps)) y[step](thread) = FragmentA<E>{};
            if (step < steps) y[step](thread) = rows.template row<E>(thread, steps, step);
          }
        });
        rebuild_plain<E, kPlainSteps>(block, half, padded_steps(steps), y, add);
      } else {
        rebuild_any<E>(block, half, steps, add);
      }
    }
    block.each([&](Thread thread) {
      const int t = thread.lane() % 4, row = own_row(thread);
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
        const int first = d + n / 2 * half + 8 * (n % 2) + 2 * (thread.lane() % 4);
        const auto c = detail::load<Neighbours<float, 2>>(offset + first);
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
        block.each([&](Thread thread) { y(thread) = rows.template row<E>(thread, steps, step); });
        MC_UNROLL
        for (int n = 0; n < 4; ++n) {
          typename Block::template PerThread<FragmentB<E>> part;
          block.each([&](Thread thread) {
            const int tile = tile_of(d, half, n);
            part(thread) = parts[rebuild_fragment(false, padded_steps(steps), tile, step, thread.lane())];
          });
          block.multiply_add(key[n], y, part);
        }
      }
      add(d, key);
    }
  }

  // Keys as they come out of the product, turned by their places, become fragments A of the next one: columns 8 n + 2 t +
  // i are its k.
  template <class T>
  MC_HD void turn_keys(Thread thread, int dim, const FragmentD (&sums)[4], int d, FragmentA<Code<T>>& low,
                       FragmentA<Code<T>>& high) const {
    using E = Code<T>;
    const int t = thread.lane() % 4, row = own_row(thread);
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
