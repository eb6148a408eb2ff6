// Softmax over keys that arrive tile by tile.
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/fragments.cuh"

namespace minicache {

// Row of the warps' 16 Rows rows that number j = 0, 1 of the thread's fragment D [m] belongs to.
template <int Rows>
MC_HD int fragment_row(Thread thread, int m, int j) {
  return thread.warp() * 16 * Rows + 16 * m + 8 * j + thread.lane() / 4;
}

// Sums of rows in shared memory, `Pitch` bytes apart, as the parts of the four lanes that share a row; every thread
// touches only its own. Behind rows of `SharedRows` there is room, and these parts lie in different banks.
template <int Rows, int Pitch>
struct RowSums {
  char* base;

  MC_HD float& at(Thread thread, int m, int j) const {
    return reinterpret_cast<float*>(base + fragment_row<Rows>(thread, m, j) * Pitch)[thread.lane() % 4];
  }
};

// State of the rows of fragments D [Rows]. Weights are 2^(scale (logit - maximum)) with scale = log2(e) / sqrt(D); a
// row that has seen no key has maximum -infinity and sum 0.
template <class Block, int Rows, int Pitch>
struct OnlineSoftmax {
  typename Block::template PerThread<float> maximum[Rows][2];
  RowSums<Rows, Pitch> sums;

  MC_HD void reset(Block& block) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        maximum[i / 2][i % 2](thread) = -kInfinity;
        sums.at(thread, i / 2, i % 2) = 0.0f;
      }
    });
  }

  // Logits [Rows][Columns] become weights in float; accumulators [Rows][Width] of earlier keys are scaled to match.
  template <int Columns, int Width>
  MC_HD void update(Block& block, float scale, typename Block::template PerThread<FragmentD> (&logits)[Rows][Columns],
                    typename Block::template PerThread<FragmentD> (&accumulators)[Rows][Width]) {
    typename Block::template PerThread<float> top[Rows][2];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        float highest = maximum[i / 2][i % 2](thread);
        MC_UNROLL
        for (int n = 0; n < Columns; ++n) {
          const FragmentD& logit = logits[i / 2][n](thread);
          highest = minicache::maximum(highest, minicache::maximum(logit.x[2 * (i % 2)], logit.x[2 * (i % 2) + 1]));
        }
        top[i / 2][i % 2](thread) = highest;
      }
    });
    MC_UNROLL
    for (int i = 0; i < 2 * Rows; ++i) block.template reduce_max<4>(top[i / 2][i % 2]);
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        const int row = i / 2, j = i % 2;
        const float highest = top[row][j](thread);
        // A row that still sees nothing keeps weights 0 rather than 2^(-infinity + infinity).
        const float base = highest == -kInfinity ? 0.0f : highest * scale;
        const float factor = exp2_approximate(maximum[row][j](thread) * scale - base);
        maximum[row][j](thread) = highest;
        float total = sums.at(thread, row, j) * factor;
        MC_UNROLL
        for (int n = 0; n < Columns; ++n) {
          float* logit = logits[row][n](thread).x + 2 * j;
          logit[0] = exp2_approximate(logit[0] * scale - base);
          logit[1] = exp2_approximate(logit[1] * scale - base);
          total += logit[0] + logit[1];
        }
        sums.at(thread, row, j) = total;
        MC_UNROLL
        for (int n = 0; n < Width; ++n) {
          float* number = accumulators[row][n](thread).x + 2 * j;
          number[0] *= factor;
          number[1] *= factor;
        }
      }
    });
  }
};

}  // namespace minicache
