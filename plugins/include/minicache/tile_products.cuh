// Tiles of rows in shared memory and the tensor-core products over them.
#pragma once

#include "minicache/fragments.cuh"
#include "minicache/layout.cuh"

namespace minicache {

// Rows of D numbers, 16 bytes apart more than they need: D is a multiple of 16, so a row is an odd number of 16-byte
// units of a 16-bit type and eight rows of a matrix lie in different banks.
template <class T, int D>
struct SharedRows {
  static constexpr int kUnit = 16 / sizeof(T);  // numbers of one asynchronous copy
  static constexpr int kStride = D + kUnit;

  T* base;

  MC_HD T* at(int row, int column) const { return base + row * kStride + column; }

  // Where the lane's row begins, for `load_matrices` of the 16 x 16 numbers at the start: the four 8 x 8 matrices
  // column by column (fragment A; pairs of fragments B, transposed), or row by row (pairs of fragments B).
  MC_HD T* by_column(Thread thread) const { return at(thread.lane() % 16, thread.lane() / 16 * 8); }
  MC_HD T* by_row(Thread thread) const {
    return at(thread.lane() / 16 * 8 + thread.lane() % 8, thread.lane() / 8 % 2 * 8);
  }

  static constexpr int bytes(int rows) { return rows * kStride * static_cast<int>(sizeof(T)); }

  // Row r is read from `source(r)`; rows from `valid` (at least 1) on become zero. The caller commits.
  template <int Rows, class Block, class F>
  MC_HD void load(Block& block, int valid, F source) const {
    constexpr int kUnits = D / kUnit, kSteps = Rows * kUnits / Block::kThreads;
    static_assert(Rows * kUnits % Block::kThreads == 0, "every thread copies alike");
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const int unit = i * Block::kThreads + thread.index, row = unit / kUnits, column = unit % kUnits * kUnit;
        Block::copy_async(at(row, column), source(row < valid ? row : 0) + column, row < valid);
      }
    });
  }

  // The same for rows that lie one behind the other.
  template <int Rows, class Block>
  MC_HD void load_block(Block& block, const T* source, int valid) const {
    constexpr int kUnits = D / kUnit, kSteps = Rows * kUnits / Block::kThreads;
    static_assert(Rows * kUnits % Block::kThreads == 0, "every thread copies alike");
    block.each([&](Thread thread) {
      const T* const from = source + thread.index * kUnit;
      const int first = thread.index / kUnits;
      T* const to = at(first, thread.index % kUnits * kUnit);
      MC_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        if constexpr (Block::kThreads % kUnits == 0) {  // steps apart by whole rows: one address and constants
          constexpr int kRows = Block::kThreads / kUnits;
          Block::copy_async(to + i * kRows * kStride, from + i * Block::kThreads * kUnit, first + i * kRows < valid);
        } else {
          // Rows are one unit longer in shared memory.
          const int unit = i * Block::kThreads + thread.index;
          const int row = static_cast<int>(static_cast<unsigned>(unit) / kUnits);
          Block::copy_async(base + (unit + row) * kUnit, from + i * Block::kThreads * kUnit, row < valid);
        }
      }
    });
  }
};

// Addresses below are one per lane and constants.

// logits [Rows][8] = Q K^T of the warp's 16 Rows rows of `queries` and 64 keys, from zero.
template <int D, int Rows, class T, class Block>
MC_HD void multiply_keys(Block& block, const SharedRows<T, D>& queries, const SharedRows<T, D>& keys,
                         typename Block::template PerThread<FragmentD> (&logits)[Rows][kBlockSize / 8]) {
  constexpr int kStride = SharedRows<T, D>::kStride;
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int i = 0; i < Rows * kBlockSize / 8; ++i) logits[i / 8][i % 8](thread) = FragmentD{{0.0f, 0.0f, 0.0f, 0.0f}};
  });
  MC_UNROLL
  for (int k = 0; k < D; k += 16) {
    typename Block::template PerThread<FragmentA<T>> query[Rows], both;
    typename Block::template PerThread<FragmentB<T>> key;
    MC_UNROLL
    for (int m = 0; m < Rows; ++m) {
      block.template load_matrices<false>(query[m], [&](Thread thread) {
        return queries.by_column(thread) + (thread.warp() * Rows + m) * 16 * kStride + k;
      });
    }
    MC_UNROLL
    for (int n = 0; n < kBlockSize / 8; ++n) {
      if (n % 2 == 0) {  // keys 8 n .. 8 n + 15
        block.template load_matrices<false>(both, [&](Thread thread) {
          return keys.by_row(thread) + 8 * n * kStride + k;
        });
      }
      block.each([&](Thread thread) { key(thread) = half_of(both(thread), n % 2); });
      MC_UNROLL
      for (int m = 0; m < Rows; ++m) block.multiply_add(logits[m][n], query[m], key);
    }
  }
}

// accumulators [Rows][D / 8] += weights V of 64 values; weights are rounded to T.
template <int D, int Rows, class T, class Block>
MC_HD void multiply_values(Block& block, typename Block::template PerThread<FragmentD> (&weights)[Rows][kBlockSize / 8],
                           const SharedRows<T, D>& values,
                           typename Block::template PerThread<FragmentD> (&accumulators)[Rows][D / 8]) {
  constexpr int kStride = SharedRows<T, D>::kStride;
  MC_UNROLL
  for (int k = 0; k < kBlockSize; k += 16) {
    typename Block::template PerThread<FragmentA<T>> rounded[Rows], both;
    typename Block::template PerThread<FragmentB<T>> value;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 4 * Rows; ++i) {
        const int m = i / 4, half = i / 2 % 2, row = i % 2;
        const float* x = weights[m][k / 8 + half](thread).x + 2 * row;
        put_pair(rounded[m](thread), row + 2 * half, round_pair<T>(x[0], x[1]));
      }
    });
    MC_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      if (n % 2 == 0) {  // components 8 n .. 8 n + 15
        block.template load_matrices<true>(both, [&](Thread thread) {
          return values.by_column(thread) + k * kStride + 8 * n;
        });
      }
      block.each([&](Thread thread) { value(thread) = half_of(both(thread), n % 2); });
      MC_UNROLL
      for (int m = 0; m < Rows; ++m) block.multiply_add(accumulators[m][n], rounded[m], value);
    }
  }
}

}  // namespace minicache
