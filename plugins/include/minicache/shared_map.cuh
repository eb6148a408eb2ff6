// Latent vectors of a cache block, in shared memory, times a layer's reading map: y P^T + residual A^T.
//
// 16-bit types take the tensor cores with two parts of bfloat16: what is lost is below 2^-16 of |row| |column|, less than
// rounding the result to 16 bits (2^-12). Floats take multiply-adds.
#pragma once

#include "minicache/dense.cuh"
#include "minicache/exact_product.cuh"

namespace minicache {

template <class T>
struct SharedMap {
  static constexpr bool kTensor = sizeof(T) == 2;
  static constexpr int kColumns = 128;  // of one product
  static constexpr int kPitch = pitch_of(kColumns);
  using E = BFloat16;
  using Planes = RowPlanes<E, 2>;

  int stored, residual, dim;  // components of y, of the residual (0: none), of the results
  char *latent_rows, *residual_rows, *staging;
  int bytes;  // of shared memory

  MC_HD SharedMap(char* base, int stored_components, int residual_components, int results)
      : stored(stored_components), residual(residual_components), dim(results) {
    latent_rows = base;
    residual_rows = latent_rows + rows_bytes(stored);
    staging = residual_rows + rows_bytes(residual);
    bytes = static_cast<int>(staging - base) + (kTensor ? 2 * kPieceBytes<2> : 4 * kDenseFloats);
  }

  // Zeros where rows are shorter than their pieces; before or after the rows are stored.
  template <class Block>
  MC_HD void pad(Block& block) const {
    if constexpr (kTensor) {
      block.each([&](Thread thread) {
        pad(thread, latent_rows, stored);
        if (residual > 0) pad(thread, residual_rows, residual);
      });
    }
  }
  MC_HD void store_latent(int row, int component, const float (&x)[kChunk]) const {
    store(latent_rows, stored, row, component, x);
  }
  MC_HD void store_residual(int row, int component, const float (&x)[kChunk]) const {
    store(residual_rows, residual, row, component, x);
  }

  // Columns [first, first + kColumns) to out [B, pitch] in shared memory; the last ones may overwrite what is multiplied.
  // `map` [dim, stored] and, where there are residuals, `residual_map` [dim, dim]. Begins with a sync.
  template <class Block>
  MC_HD void multiply(Block& block, const float* map, const float* residual_map, int first, float* out,
                      int pitch) const {
    if constexpr (kTensor) {
      ExactSums<Block> sum;
      clear(block, sum);
      const int width = minimum(dim - first, kColumns);
      auto* const fragments = reinterpret_cast<FragmentA<E>*>(staging);
      const auto add = [&](char* rows, const float* numbers, int depth) {
        const ExactMatrix matrix{numbers + first * depth, depth, dim, width, true};
        multiply_add_wide(block, sum, Planes{reinterpret_cast<E*>(rows)}, matrix, fragments);
      };
      add(latent_rows, map, stored);
      if (residual > 0) add(residual_rows, residual_map, residual);
      if (first + kColumns >= dim) block.sync();  // results may take the place of what they came from
      store_wide(block, sum, width, out, pitch);
    } else {
      typename Block::template PerThread<Accumulator> sum;
      clear(block, sum);
      auto* const numbers = reinterpret_cast<float*>(staging);
      const auto add = [&](char* rows, const float* matrix, int depth) {
        DenseMatrix{matrix, depth, dim, true}.multiply_add(block, sum, reinterpret_cast<const float*>(rows),
                                                           pitch_of(depth), first, numbers);
      };
      add(latent_rows, map, stored);
      if (residual > 0) add(residual_rows, residual_map, residual);
      block.sync();
      store_results(block, sum, first, dim, out - first, pitch);
    }
  }

 private:
  MC_HD static int rows_bytes(int depth) {
    if (depth == 0) return 0;
    return kTensor ? exact_pieces(depth) * Planes::kBytes : kBlockSize * pitch_of(depth) * 4;
  }
  MC_HD static void pad(Thread thread, char* rows, int depth) {
    const int last = exact_pieces(depth) - 1, own = component_of(thread, 0);
    if (last * kHalfPiece + own < depth >> 1) return;
    const float zeros[kChunk] = {};
    MC_UNROLL
    for (int half = 0; half < 2; ++half) Planes{reinterpret_cast<E*>(rows)}.piece(last).store(row_of(thread), half, own, zeros);
  }
  MC_HD static void store(char* rows, int depth, int row, int component, const float (&x)[kChunk]) {
    if constexpr (kTensor) {
      Planes{reinterpret_cast<E*>(rows)}.store_chunk(depth, row, component, x);
    } else {
      minicache::store_chunk(reinterpret_cast<float*>(rows) + row * pitch_of(depth) + component, x);
    }
  }
};

}  // namespace minicache
