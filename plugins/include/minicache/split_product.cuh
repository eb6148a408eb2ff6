// Products of restored rows with a reading map on the tensor cores.
//
// Both factors are split into two bfloat16 numbers, x = high + low up to 2^-18 |x|, and three of the four products are
// summed in float: what is lost is below 2^-16 of |row| |column|, less than rounding the result to 16 bits (2^-12).
//
// A block of 256 threads computes 64 rows x 128 columns: warp w rows 16 (w % 4) .. + 15, columns 64 (w / 4) .. + 63.
#pragma once

#include "minicache/dense.cuh"

namespace minicache {

constexpr int kSplitPitch = kDenseDepth + 8;  // numbers per column in shared memory: fragments without bank conflicts
constexpr int kSplitFloats = kDenseColumns * kSplitPitch;  // shared memory for both halves of the matrix
constexpr int kSplitTiles = 8;                             // of 8 columns, per warp

template <class Block>
struct SplitSums {
  typename Block::template PerThread<FragmentD> tile[kSplitTiles];
};

MC_HD void split(float x, BFloat16& high, BFloat16& low) {
  high = from_float<BFloat16>(x);
  low = from_float<BFloat16>(x - to_float(high));
}

template <class Block>
MC_HD void clear(Block& block, SplitSums<Block>& sum) {
  MC_UNROLL
  for (int tile = 0; tile < kSplitTiles; ++tile)
    block.each([&](Thread thread) { sum.tile[tile](thread) = FragmentD{}; });
}

// Results to shared memory [B, pitch], columns from `first` to below `columns`.
template <class Block>
MC_HD void store_results(Block& block, const SplitSums<Block>& sum, int first, int columns, float* rows, int pitch) {
  block.each([&](Thread thread) {
    const int row = 16 * (thread.warp() % 4) + thread.lane() / 4;
    MC_UNROLL
    for (int tile = 0; tile < kSplitTiles; ++tile) {
      const int column = first + 64 * (thread.warp() / 4) + 8 * tile + 2 * (thread.lane() % 4);
      if (column >= columns) continue;
      MC_UNROLL
      for (int j = 0; j < 2; ++j) {
        MC_UNROLL
        for (int i = 0; i < 2; ++i) rows[(row + 8 * j) * pitch + column + i] = sum.tile[tile](thread).x[2 * j + i];
      }
    }
  });
}

struct SplitMatrix {
  const float* numbers;  // [columns, depth]: the product's matrix transposed, rows multiples of 16 numbers
  int depth, columns;

  // Columns [first, first + 128) and depth [k, k + 16) to shared memory, columns beyond the last as zeros.
  template <class Block>
  MC_HD void stage(Block& block, int k, int first, BFloat16* high, BFloat16* low) const {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int part = 0; part < kDenseDepth * kDenseColumns / 4 / kTileThreads; ++part) {
        const int i = thread.index + part * kTileThreads, column = i / 4, place = 4 * (i % 4);
        Bytes16 bytes{};
        if (first + column < columns) bytes = load_as<Bytes16>(numbers + (first + column) * depth + k + place);
        MC_UNROLL
        for (int e = 0; e < 4; e += 2) {
          BFloat16 h[2], l[2];
          split(bit_cast<float>(bytes.words[e]), h[0], l[0]);
          split(bit_cast<float>(bytes.words[e + 1]), h[1], l[1]);
          const int at = column * kSplitPitch + place + e;
          store_as(high + at, static_cast<std::uint32_t>(h[0].bits | static_cast<std::uint32_t>(h[1].bits) << 16));
          store_as(low + at, static_cast<std::uint32_t>(l[0].bits | static_cast<std::uint32_t>(l[1].bits) << 16));
        }
      }
    });
  }

  // A warp's columns 8 `tile` .. + 7.
  template <class Block>
  MC_HD static void load_columns(Block& block, typename Block::template PerThread<FragmentB<BFloat16>>& out,
                                 const BFloat16* from, int tile) {
    block.each([&](Thread thread) {
      const int column = 64 * (thread.warp() / 4) + 8 * tile + thread.lane() / 4;
      MC_UNROLL
      for (int j = 0; j < 2; ++j) {
        const BFloat16* pair = from + column * kSplitPitch + 8 * j + 2 * (thread.lane() % 4);
        store_as(out(thread).x + 2 * j, load_as<std::uint32_t>(pair));
      }
    });
  }

  // sum += rows M^T[:, first : first + 128]; `rows` [B, pitch] and the staging memory are shared. Begins with a sync.
  template <class Block>
  MC_HD void multiply_add(Block& block, SplitSums<Block>& sum, const float* rows, int pitch, int first,
                          float* staging) const {
    typename Block::template PerThread<FragmentA<BFloat16>> row_high, row_low;
    typename Block::template PerThread<FragmentB<BFloat16>> column_high, column_low;
    BFloat16* high = reinterpret_cast<BFloat16*>(staging);
    BFloat16* low = high + kDenseColumns * kSplitPitch;
    MC_NO_UNROLL
    for (int k = 0; k < depth; k += kDenseDepth) {
      block.sync();
      stage(block, k, first, high, low);
      block.sync();
      block.each([&](Thread thread) {
        const int row = 16 * (thread.warp() % 4) + thread.lane() / 4;
        MC_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float* pair = rows + (row + 8 * (j % 2)) * pitch + k + 2 * (thread.lane() % 4) + 8 * (j / 2);
          MC_UNROLL
          for (int i = 0; i < 2; ++i) split(pair[i], row_high(thread).x[2 * j + i], row_low(thread).x[2 * j + i]);
        }
      });
      MC_UNROLL
      for (int tile = 0; tile < kSplitTiles; ++tile) {
        load_columns(block, column_high, high, tile);
        load_columns(block, column_low, low, tile);
        block.multiply_add(sum.tile[tile], row_low, column_high);
        block.multiply_add(sum.tile[tile], row_high, column_low);
        block.multiply_add(sum.tile[tile], row_high, column_high);
      }
    }
  }
};

}  // namespace minicache
