// Latent vectors of a cache block, in shared memory, times a layer's reading map: y P^T.
//
// 16-bit types take the tensor cores with two parts of bfloat16: what is lost is below 2^-16 of |row| |column|, less
// than rounding the result to 16 bits (2^-12). Floats take multiply-adds.
#pragma once

#include "minicache/dense.cuh"
#include "minicache/exact_product.cuh"

namespace minicache {

template <class T>
struct SharedMap {
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kColumns = 128;  // of one product
  static constexpr int kPitch = pitch_of(kColumns), kResultBytes = 4 * kBlockSize * kPitch;
  using E = BFloat16;
  using Planes = RowPlanes<E, 2>;
  static_assert(2 * kPieceBytes<2> <= kResultBytes && 4 * kDenseFloats <= kResultBytes, "results take staging's place");

  int stored, dim;  // components of y, of the results
  char* rows;
  float* results;  // [B, kPitch]; before them, in their place, staging
  int bytes;       // of shared memory

  MC_HD SharedMap(char* base, int stored_components, int columns)
      : stored(stored_components), dim(columns), rows(base) {
    const int own = kTensor ? exact_pieces(stored) * Planes::kBytes : kBlockSize * pitch_of(stored) * 4;
    results = reinterpret_cast<float*>(base + own);
    bytes = own + kResultBytes;
  }

  // Eight results of the last product.
  MC_HD const float* chunk(int row, int component) const { return results + row * kPitch + component; }

  // Zeros where rows are shorter than their pieces; before or after the rows are stored.
  template <class Block>
  MC_HD void pad(Block& block) const {
    if constexpr (kTensor) {
      block.each([&](Thread thread) {
        const int last = exact_pieces(stored) - 1, own = component_of(thread, 0);
        if (last * kHalfPiece + own < stored >> 1) return;
        const float zeros[kChunk] = {};
        MC_UNROLL
        for (int half = 0; half < 2; ++half) {
          Planes{reinterpret_cast<E*>(rows)}.piece(last).store(row_of(thread), half, own, zeros);
        }
      });
    }
  }

  MC_HD void store(int row, int component, const float (&x)[kChunk]) const {
    if constexpr (kTensor) {
      Planes{reinterpret_cast<E*>(rows)}.store_chunk(stored, row, component, x);
    } else {
      store_chunk(reinterpret_cast<float*>(rows) + row * pitch_of(stored) + component, x);
    }
  }

  // Columns [first, first + kColumns). `map` [dim, stored]. Begins with a sync.
  template <class Block>
  MC_HD void multiply(Block& block, const float* map, int first) const {
    if constexpr (kTensor) {
      ExactSums<Block> sum;
      clear(block, sum);
      const int width = minimum(dim - first, kColumns);
      const ExactMatrix matrix{map + first * stored, stored, dim, width, true};
      multiply_add_wide(block, sum, Planes{reinterpret_cast<E*>(rows)}, matrix,
                        reinterpret_cast<FragmentA<E>*>(results));
      block.sync();
      store_wide(block, sum, width, results, kPitch);
    } else {
      typename Block::template PerThread<Accumulator> sum;
      clear(block, sum);
      DenseMatrix{map, stored, dim, true}.multiply_add(block, sum, reinterpret_cast<const float*>(rows),
                                                       pitch_of(stored), first, results);
      block.sync();
      store_results(block, sum, first, dim, results - first, kPitch);
    }
  }
};

}  // namespace minicache
