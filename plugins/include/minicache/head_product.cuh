// Products of rows with a matrix of a head on the tensor cores, in more than 16 bits.
//
// Numbers are sums of two parts in bfloat16, which reach as far as floats do and hold 16 bits of them; products of both
// second parts are left out, 2^-16 of a product. Sums are floats.
#pragma once

#include "minicache/decode_split.cuh"
#include "minicache/fragments.cuh"

namespace minicache {

template <class T>
struct HeadPart {
  using type = BFloat16;
  static constexpr int kParts = 2;
};
template <>
struct HeadPart<float> {
  using type = float;
  static constexpr int kParts = 1;
};

// A thread block: kColumns columns, 16 per warp, of 8 `Tiles` rows.
template <class T, int Tiles>
struct HeadProduct {
  using E = typename HeadPart<T>::type;
  static constexpr int kParts = HeadPart<T>::kParts, kRows = 8 * Tiles, kColumns = 16 * kDecodeWarps;

  using Numbers = Neighbours<float, 4>;
  template <class Block>
  struct Sums {
    typename Block::template PerThread<FragmentD> tile[Tiles];
  };

  MC_HD static constexpr int shared_bytes(int depth) {
    return depth / 16 * Tiles * kParts * kWarp * static_cast<int>(sizeof(FragmentB<E>));
  }

  template <class Block>
  MC_HD static void clear(Block& block, Sums<Block>& sums) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < Tiles; ++n) sums.tile[n](thread) = FragmentD{};
    });
  }

  // Adds the products over `depth` components, a multiple of 16: `row(n, k)` and `column(m, k)` are four Numbers from
  // component k, a multiple of 4, of row n and column m of the thread block, of which `columns` are wanted. Begins with
  // a `sync`.
  template <class Block, class Row, class Column>
  MC_HD static void add(Block& block, Sums<Block>& sums, int depth, int columns, Row row, Column column) {
    const int steps = depth / 16;
    block.sync();
    block.each([&](Thread thread) {
      for (int n = thread.warp(); n < steps * Tiles; n += kDecodeWarps) {
        Pair<E> parts[2][kParts];
        split(row(n % Tiles * 8 + thread.lane() / 4, 16 * (n / Tiles) + 4 * (thread.lane() % 4)), parts);
        MC_UNROLL
        for (int p = 0; p < kParts; ++p) {
          MC_UNROLL
          for (int j = 0; j < 2; ++j) put_pair(at(block.shared, n * kParts + p, thread), j, parts[j][p]);
        }
      }
    });
    block.sync();
    if (!block.any_warp([&](Thread thread) { return 16 * thread.warp() < columns; })) return;
    // Columns of the next step are under way while one is computed.
    typename Block::template PerThread<Numbers> next[2];
    auto load = [&](int step) {
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int half = 0; half < 2; ++half) {
          next[half](thread) = column(own_row(thread) + 8 * half, 16 * step + 4 * (thread.lane() % 4));
        }
      });
    };
    load(0);
    MC_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      typename Block::template PerThread<FragmentA<E>> left[kParts];
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int half = 0; half < 2; ++half) {
          Pair<E> parts[2][kParts];
          split(next[half](thread), parts);
          MC_UNROLL
          for (int p = 0; p < kParts; ++p) {
            MC_UNROLL
            for (int j = 0; j < 2; ++j) put_pair(left[p](thread), half + 2 * j, parts[j][p]);
          }
        }
      });
      if (step + 1 < steps) load(step + 1);
      MC_UNROLL
      for (int n = 0; n < Tiles; ++n) {
        typename Block::template PerThread<FragmentB<E>> right[kParts];
        block.each([&](Thread thread) {
          MC_UNROLL
          for (int p = 0; p < kParts; ++p) {
            right[p](thread) = at(block.shared, (step * Tiles + n) * kParts + p, thread);
          }
        });
        MC_UNROLL
        for (int p = kParts - 1; p > 0; --p) {  // the smallest first
          block.multiply_add(sums.tile[n], left[p], right[0]);
          block.multiply_add(sums.tile[n], left[0], right[p]);
        }
        block.multiply_add(sums.tile[n], left[0], right[0]);
      }
    }
  }

  // f(n, m, sum) of the thread's rows and columns.
  template <class Block, class F>
  MC_HD static void each_sum(Block& block, const Sums<Block>& sums, F f) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < Tiles; ++n) {
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          f(8 * n + 2 * (thread.lane() % 4) + i % 2, own_row(thread) + 8 * (i / 2), sums.tile[n](thread).x[i]);
        }
      }
    });
  }

 private:
  MC_HD static FragmentB<E>& at(char* shared, int n, Thread thread) {
    return reinterpret_cast<FragmentB<E>*>(shared)[n * kWarp + thread.lane()];
  }
  // Components 4 t to 4 t + 3 of a step are those that fragments number 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
  MC_HD static void split(const Numbers& x, Pair<E> (&out)[2][kParts]) {
    split_pair<E>(x.x[0], x.x[1], out[0]);
    split_pair<E>(x.x[2], x.x[3], out[1]);
  }
};

}  // namespace minicache
