// Softmax over keys that arrive tile by tile.
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/fragments.cuh"

namespace minicache {

constexpr float kLog2E = 1.44269504088896f;

// 2^x within 2 ulp, subnormal results as zero; 2^-infinity is 0.
MC_HD float exp2_approximate(float x) {
#if MC_ON_DEVICE
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return __builtin_exp2f(x);
#endif
}

// State of the rows of fragments D [Rows]: thread's rows are g + 8 j, j = 0..1, of each. Weights are
// 2^(scale (logit - maximum)) with scale = log2(e) / sqrt(D); a row that has seen no key has maximum -infinity and sum 0.
// `sum` is the thread's own part: a row's sum is that of the four lanes that share it.
template <class Block, int Rows>
struct OnlineSoftmax {
  typename Block::template PerThread<float> maximum[Rows][2], sum[Rows][2];

  MC_HD void reset(Block& block) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        maximum[i / 2][i % 2](thread) = -kInfinity;
        sum[i / 2][i % 2](thread) = 0.0f;
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
        float total = sum[row][j](thread) * factor;
        MC_UNROLL
        for (int n = 0; n < Columns; ++n) {
          float* logit = logits[row][n](thread).x + 2 * j;
          logit[0] = exp2_approximate(logit[0] * scale - base);
          logit[1] = exp2_approximate(logit[1] * scale - base);
          total += logit[0] + logit[1];
        }
        sum[row][j](thread) = total;
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
