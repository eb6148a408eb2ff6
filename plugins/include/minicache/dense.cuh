// Products of a cache block's rows with a calibrated matrix, in float32 multiply-adds.
//
// A block of 256 threads computes 64 rows x 128 columns: warp w rows 8 w .. 8 w + 7, lane l columns 4 l .. 4 l + 3. Rows
// lie in shared memory as floats; the matrix passes through it, 16 rows of the product's depth at a time.
#pragma once

#include "minicache/tile.cuh"

namespace minicache {

constexpr int kDenseColumns = 128, kDenseDepth = 16, kDensePitch = kDenseColumns + 4;
constexpr int kDenseFloats = kDenseDepth * kDensePitch;  // shared memory for the matrix

// Results of a thread: row 8 w + i, column 4 l + c.
struct Accumulator {
  float x[8][4];
};

MC_HD int dense_row(Thread thread, int i) { return 8 * thread.warp() + i; }
MC_HD int dense_column(Thread thread) { return 4 * thread.lane(); }

template <class Block>
MC_HD void clear(Block& block, typename Block::template PerThread<Accumulator>& sum) {
  block.each([&](Thread thread) { sum(thread) = Accumulator{}; });
}

// Calls `visit(row, column, numbers)` for the four results of each row, columns from `first` to below `columns`.
template <class Block, class Visit>
MC_HD void visit_results(Block& block, typename Block::template PerThread<Accumulator>& sum, int first, int columns,
                         Visit visit) {
  block.each([&](Thread thread) {
    const int column = first + dense_column(thread);
    if (column >= columns) return;
    MC_UNROLL
    for (int i = 0; i < 8; ++i) visit(dense_row(thread, i), column, sum(thread).x[i]);
  });
}

// Results to shared memory [B, pitch], columns from `first` to below `columns`.
template <class Block>
MC_HD void store_results(Block& block, typename Block::template PerThread<Accumulator>& sum, int first, int columns,
                         float* rows, int pitch) {
  visit_results(block, sum, first, columns,
                [&](int row, int column, const float(&x)[4]) { store_four(rows + row * pitch + column, x); });
}

struct DenseMatrix {
  const float* numbers;  // M [depth, columns], or [columns, depth] if transposed; rows are multiples of 16 numbers
  int depth, columns;
  bool transposed;

  // Rows [k, k + 16) and columns [first, first + 128) of M to shared memory; columns beyond the last are zero.
  template <class Block>
  MC_HD void stage(Block& block, int k, int first, float* shared) const {
    block.each([&](Thread thread) {
      for (int i = thread.index; i < kDenseDepth * kDenseColumns / 4; i += kTileThreads) {
        const int row = transposed ? 4 * (i % 4) : i / 32, column = transposed ? i / 4 : 4 * (i % 32);
        const bool valid = first + column < columns;
        Bytes16 bytes{};
        if (valid && transposed) bytes = load_as<Bytes16>(numbers + (first + column) * depth + k + row);
        if (valid && !transposed) bytes = load_as<Bytes16>(numbers + (k + row) * columns + first + column);
        if (transposed) {
          MC_UNROLL
          for (int e = 0; e < 4; ++e) shared[(row + e) * kDensePitch + column] = bit_cast<float>(bytes.words[e]);
        } else {
          store_as(shared + row * kDensePitch + column, bytes);
        }
      }
    });
  }

  // sum += rows M[:, first : first + 128]; `rows` [B, pitch] and the staging memory are shared. Begins with a sync.
  template <class Block>
  MC_HD void multiply_add(Block& block, typename Block::template PerThread<Accumulator>& sum, const float* rows,
                          int pitch, int first, float* staging) const {
    for (int k = 0; k < depth; k += kDenseDepth) {
      block.sync();
      stage(block, k, first, staging);
      block.sync();
      block.each([&](Thread thread) {
        float(&total)[8][4] = sum(thread).x;
        MC_NO_UNROLL
        for (int step = 0; step < kDenseDepth; step += 4) {
          Bytes16 m[4];
          MC_UNROLL
          for (int e = 0; e < 4; ++e)
            m[e] = load_as<Bytes16>(staging + (step + e) * kDensePitch + dense_column(thread));
          MC_UNROLL
          for (int i = 0; i < 8; ++i) {
            const Bytes16 row = load_as<Bytes16>(rows + dense_row(thread, i) * pitch + k + step);
            MC_UNROLL
            for (int e = 0; e < 4; ++e) {
              const float x = bit_cast<float>(row.words[e]);
              MC_UNROLL
              for (int c = 0; c < 4; ++c) total[i][c] += x * bit_cast<float>(m[e].words[c]);
            }
          }
        }
      });
    }
  }
};

}  // namespace minicache
