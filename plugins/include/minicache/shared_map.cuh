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
  static constexpr int kPitch = pitch_of(kColumns), kResultBytes = 4 * kBlockSize * kPitch;
  using E = BFloat16;
  using Planes = RowPlanes<E, 2>;
  static_assert(2 * kPieceBytes<2> <= kResultBytes && 4 * kDenseFloats <= kResultBytes, "results take staging's place");

  int stored, residual, dim;  // components of y, of the residual (0: none), of the results
  char *latent_rows, *residual_rows;
  float* results;  // [products kept][B, kPitch]
  char* staging;   // where the results of the last product go
  int bytes;       // of shared memory

  // `kept`: how many products' results there is room for at a time.
  MC_HD SharedMap(char* base, int stored_components, int residual_components, int columns, int kept)
      : stored(stored_components), residual(residual_components), dim(columns) {
    latent_rows = base;
    residual_rows = latent_rows + rows_bytes(stored);
    results = reinterpret_cast<float*>(residual_rows + rows_bytes(residual));
    staging = reinterpret_cast<char*>(results) + (kept - 1) * kResultBytes;
    bytes = static_cast<int>(staging - base) + kResultBytes;
  }
  MC_HD static int products_of(int columns) { return ceil_div(columns, kColumns); }

  // Eight results.
  MC_HD const float* chunk(int row, int component) const {
    return results + component / kColumns * (kResultBytes / 4) + row * kPitch + component % kColumns;
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

  // Columns [first, first + kColumns) to results number `place`. `map` [dim, stored] and, where there are residuals,
  // `residual_map` [dim, dim]. Begins with a sync.
  template <class Block>
  MC_HD void multiply(Block& block, const float* map, const float* residual_map, int first, int place) const {
    float* const out = results + place * (kResultBytes / 4);
    const bool in_place = reinterpret_cast<char*>(out) == staging;
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
      if (in_place) block.sync();
      store_wide(block, sum, width, out, kPitch);
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
      if (in_place) block.sync();
      store_results(block, sum, first, dim, out - first, kPitch);
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
