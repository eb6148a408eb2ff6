// Products of a cache block's rows with calibrated matrices on the tensor cores, in more than 16 bits.
//
// Factors are sums of parts that the tensor cores take, x = x_0 + x_1 + ..., each the rest rounded to 16 bits. Products of
// parts i and j are taken where i + j is less than the parts of the matrix. Two parts of binary16, or three of bfloat16,
// hold what a float holds, and what is left out is below 2^-22 |row| |column|; two parts of bfloat16 leave out 2^-16.
// Sums of tensor cores may be truncated, so they end after 32 components and are added as floats, unless the results are
// rounded to 16 bits anyhow. Columns in binary16 are scaled by powers of two to where no part leaves its range.
//
// The depth is taken in pieces of 32 components of its first half and the 32 they are paired with in the second. A block
// of 256 threads computes 64 rows x 64 columns: warp w rows 32 (w % 2) .. + 31, columns 32 (w / 2 % 2) .. + 31, and of
// the depth half w / 4; the halves are added at the end. Or, `Wide`, 64 rows x 128 columns: the columns' half w / 4 and
// all of the depth. The matrix is the left factor, D = M^T X^T: registers of a row are operands as they are read, 16 bytes
// at a time.
#pragma once

#include <type_traits>

#include "minicache/fragments.cuh"
#include "minicache/tile.cuh"

namespace minicache {

constexpr int kExactColumns = 64;               // of a thread block
constexpr int kHalfPiece = 32;                  // components of each half of the depth
constexpr int kColumnTiles = 2, kRowTiles = 4;  // of 16 columns and 8 rows, per warp; each half adds up one of columns

// Fragments A of M^T: [halves][steps of 16 components][tiles of 16 columns][parts][lanes]. Component 8 j + 2 t + i of a
// step, as fragments number them, is component 8 t + 4 step + 2 j + i of the half.
template <int Parts>
constexpr int kPieceFragments = 4 * kExactColumns / 16 * Parts * kWarp;
template <int Parts>
constexpr int kPieceBytes = kPieceFragments<Parts> * static_cast<int>(sizeof(FragmentA<Half>));

// Where a lane's fragment lies among those of its warp: neither readers nor writers meet bank conflicts.
MC_HD int fragment_slot(int lane) { return lane ^ (lane >> 1 & 4); }

MC_HD int exact_pieces(int depth) { return ceil_div(depth / 2, kHalfPiece); }

// What a thread has to do with: half of the depth, or of the columns; of its warp, the first row and, of 64, column.
struct ExactPlace {
  int half, row, column, g, t;

  MC_HD explicit ExactPlace(Thread thread)
      : half(thread.index >> 7),
        row(thread.index & 32),
        column(thread.index >> 1 & 32),
        g(thread.index >> 2 & 7),
        t(thread.index & 3) {}
};

// One part of a warp's rows in `Steps` steps of 16 components.
template <class Block, class E, int Steps>
struct ExactRows {
  typename Block::template PerThread<FragmentB<E>> step[Steps][kRowTiles];
};

// Tiles of columns, first the one that the thread's half of the warps adds up in the end.
template <class Block>
struct ExactSums {
  typename Block::template PerThread<FragmentD> tile[kColumnTiles][kRowTiles];
};

template <class Block>
MC_HD void clear(Block& block, ExactSums<Block>& sum) {
  MC_UNROLL
  for (int i = 0; i < kColumnTiles * kRowTiles; ++i)
    block.each([&](Thread thread) { sum.tile[i / kRowTiles][i % kRowTiles](thread) = FragmentD{}; });
}

// A piece of rows [B, depth] in the compute type.
template <class E, class Block>
MC_HD void load_rows(Block& block, ExactRows<Block, E, 2>& out, const E* rows, int depth, int piece) {
  block.each([&](Thread thread) {
    const ExactPlace place(thread);
    const int component = kHalfPiece * piece + 8 * place.t;
    const E* const from = rows + ((place.row + place.g) * depth + place.half * (depth >> 1) + component);
    const bool valid = 2 * component < depth;
    MC_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const Bytes16 own = valid ? load_as<Bytes16>(from + 8 * tile * depth) : Bytes16{};
      MC_UNROLL
      for (int word = 0; word < 4; ++word) put_pair(out.step[word / 2][tile](thread), word % 2, Pair<E>{own.words[word]});
    }
  });
}

// A piece of rows of floats as parts in shared memory: [parts][B][halves][steps][4 t][4 components], halves and steps
// exchanged by row so that neither readers nor writers meet bank conflicts.
template <class E, int Parts>
struct RowPlanes {
  static constexpr int kNumbers = kBlockSize * 2 * kHalfPiece;
  static constexpr int kBytes = Parts * kNumbers * static_cast<int>(sizeof(E));
  E* numbers;

  // Where rows of `depth` components have several pieces, one after another.
  MC_HD RowPlanes piece(int number) const { return RowPlanes{numbers + number * Parts * kNumbers}; }
  // Stores eight components from `component` of rows of `depth` to their piece.
  MC_HD void store_chunk(int depth, int row, int component, const float (&x)[kChunk]) const {
    const int half = component >= depth >> 1 ? 1 : 0, own = component - half * (depth >> 1);
    piece(own / kHalfPiece).store(row, half, own % kHalfPiece, x);
  }

  MC_HD E* four(int part, int row, int half, int step, int t) const {
    return numbers + part * kNumbers + row * 2 * kHalfPiece + ((2 * half + step) ^ row % 4) * 16 + 4 * t;
  }
  MC_HD void store(int row, int half, int component, const float (&x)[kChunk]) const {
    MC_UNROLL
    for (int step = 0; step < 2; ++step) {
      FragmentB<E> four_of[Parts];
      MC_UNROLL
      for (int j = 0; j < 2; ++j) {
        Pair<E> pair[Parts];
        split_pair(x[4 * step + 2 * j], x[4 * step + 2 * j + 1], pair);
        MC_UNROLL
        for (int part = 0; part < Parts; ++part) put_pair(four_of[part], j, pair[part]);
      }
      MC_UNROLL
      for (int part = 0; part < Parts; ++part) store_as(four(part, row, half, step, component / kChunk), four_of[part]);
    }
  }
  // One step of a part, of half a piece.
  template <class Block, class Half>
  MC_HD void load(Block& block, ExactRows<Block, E, 1>& out, int part, int step, Half half) const {
    block.each([&](Thread thread) {
      const ExactPlace place(thread);
      MC_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const int row = place.row + 8 * tile + place.g;
        out.step[0][tile](thread) = load_as<FragmentB<E>>(four(part, row, half(place), step, place.t));
      }
    });
  }
};

// 64 columns of a matrix.
struct ExactMatrix {
  const float* numbers;  // [depth, columns], or [columns, depth] if transposed: from the first of the 64 on
  int depth, columns;    // multiples of 16
  int width;             // columns there are: the others are zero
  bool transposed = false;

  MC_HD ExactMatrix right_of(int column) const {
    return ExactMatrix{numbers + (transposed ? column * depth : column), depth, columns, width - column, transposed};
  }

  // One piece to shared memory, `Scaled` by `scales` [64].
  template <int Parts, bool Scaled, class E, class Block>
  MC_HD void stage(Block& block, int piece, const float* scales, FragmentA<E>* to) const {
    static_assert(Block::kThreads == 256, "a thread stages four components of columns c, c + 1, c + 8 and c + 9");
    block.each([&](Thread thread) {
      const unsigned index = forgotten(thread).index;
      const int t = index % 4, two = index / 4 % 4, tile = index / 16 % 4, step = index / 64 % 2, half = index / 128;
      const int component = kHalfPiece * piece + 8 * t + 4 * step, column = 16 * tile + 2 * two;
      Bytes16 own[4] = {};  // of each column
      if (2 * component < depth && column < width) load(half * (depth >> 1) + component, column, own);
      MC_UNROLL
      for (int c = 0; c < 2; ++c) {
        FragmentA<E> fragment[Parts];
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float scale = Scaled ? scales[column + 8 * (i % 2) + c] : 1.0f;
          const std::uint32_t* const two_numbers = own[2 * (i % 2) + c].words + i / 2 * 2;
          Pair<E> pair[Parts];
          split_pair(bit_cast<float>(two_numbers[0]) * scale, bit_cast<float>(two_numbers[1]) * scale, pair);
          MC_UNROLL
          for (int part = 0; part < Parts; ++part) put_pair(fragment[part], i, pair[part]);
        }
        FragmentA<E>* const target = to + ((2 * half + step) * kExactColumns / 16 + tile) * Parts * kWarp;
        MC_UNROLL
        for (int part = 0; part < Parts; ++part)
          store_as(target + part * kWarp + fragment_slot(4 * (2 * two + c) + t), fragment[part]);
      }
    });
  }

  // Components `component` .. + 3 of columns c, c + 1, c + 8 and c + 9.
  MC_HD void load(int component, int column, Bytes16 (&out)[4]) const {
    MC_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (transposed) {
        out[i] = load_as<Bytes16>(numbers + (column + 8 * (i / 2) + i % 2) * depth + component);
      } else {
        const float* const from = numbers + (component + i) * columns + column;
        MC_UNROLL
        for (int right = 0; right < 2; ++right) {
          const auto both = load_as<std::uint64_t>(from + 8 * right);
          out[2 * right].words[i] = static_cast<std::uint32_t>(both);
          out[2 * right + 1].words[i] = static_cast<std::uint32_t>(both >> 32);
        }
      }
    }
  }

  // Raises `most(thread)` to the largest magnitudes of columns 4 (i % 16) .. + 3 in rows i / 16, i / 16 + 16, ...
  template <class Block>
  MC_HD void find_most(Block& block, typename Block::template PerThread<Bytes16>& most) const {
    block.each([&](Thread thread) {
      const int column = thread.index % 16 * 4;
      if (column >= width) return;
      MC_NO_UNROLL
      for (int row = thread.index / 16; row < depth; row += Block::kThreads / 16) {
        const Bytes16 own = load_as<Bytes16>(numbers + row * columns + column);
        MC_UNROLL
        for (int c = 0; c < 4; ++c)  // magnitudes are ordered as their bits are
          most(thread).words[c] = maximum(most(thread).words[c], own.words[c] & 0x7fffffffu);
      }
    });
  }
};

// Powers of two `scales` [64] that bring each column's largest magnitude to [2^14, 2^15), and their inverses, from what
// `ExactMatrix::find_most` found; the caller synchronizes. `scratch`: 4 KiB of shared memory.
template <class Block>
MC_HD void choose_scales(Block& block, const typename Block::template PerThread<Bytes16>& most, Bytes16* scratch,
                         float* scales, float* inverses) {
  block.each([&](Thread thread) { scratch[thread.index] = most(thread); });
  block.sync();
  block.each([&](Thread thread) {
    if (thread.index >= kExactColumns) return;
    std::uint32_t largest = 0;
    for (int line = 0; line < Block::kThreads / 16; ++line)
      largest = maximum(largest, scratch[16 * line + thread.index / 4].words[thread.index % 4]);
    // Exponents of both stay within those of floats: a column below 2^-112 is scaled as one of that size.
    const std::uint32_t exponent = maximum(largest >> 23, 15u);
    scales[thread.index] = bit_cast<float>((268u - exponent) << 23);
    inverses[thread.index] = bit_cast<float>((exponent - 14u) << 23);
  });
}

// sum += rows M for `Steps` steps of half a piece from `first` on. `rows`: the rows' parts; `half(place)`: which half; the
// piece is in shared memory. `Wide`: the second half of the columns has its piece `apart` fragments further, and sums stay
// on the tensor cores.
template <int Parts, bool Wide, class E, int RowParts, int Steps, class Block, class Half>
MC_HD void multiply_add(Block& block, ExactSums<Block>& sum, const ExactRows<Block, E, Steps> (&rows)[RowParts],
                        const FragmentA<E>* piece, int first, Half half, int apart = 0) {
  typename Block::template PerThread<FragmentA<E>> matrix;
  typename Block::template PerThread<FragmentD> partial[kRowTiles];
  MC_UNROLL
  for (int column = 0; column < kColumnTiles; ++column) {
    auto& target = Wide ? sum.tile[column] : partial;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int row = 0; row < kRowTiles && !Wide; ++row) partial[row](thread) = FragmentD{};
    });
    MC_UNROLL
    for (int step = 0; step < Steps; ++step) {
      MC_UNROLL
      for (int part = Parts - 1; part >= 0; --part) {  // small ones first
        block.each([&](Thread thread) {
          const ExactPlace own(thread);
          const int tile = own.column / 16 + (Wide ? column : column ^ own.half);
          const int place = (2 * half(own) + first + step) * kExactColumns / 16 + tile;
          const FragmentA<E>* const from = piece + (Wide ? own.half * apart : 0);
          matrix(thread) = load_as<FragmentA<E>>(from + (place * Parts + part) * kWarp + fragment_slot(thread.lane()));
        });
        MC_UNROLL
        for (int i = minimum(RowParts, Parts - part) - 1; i >= 0; --i) {
          MC_UNROLL
          for (int row = 0; row < kRowTiles; ++row) block.multiply_add(target[row], matrix, rows[i].step[step][row]);
        }
      }
    }
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int row = 0; row < kRowTiles && !Wide; ++row) {
        MC_UNROLL
        for (int i = 0; i < 4; ++i) sum.tile[column][row](thread).x[i] += partial[row](thread).x[i];
      }
    });
  }
}

// sum += one piece of rows in shared memory times the matrix's, which is there, too.
template <class E, int Parts, class Block>
MC_HD void multiply_add(Block& block, ExactSums<Block>& sum, const RowPlanes<E, Parts>& planes,
                        const FragmentA<E>* piece) {
  ExactRows<Block, E, 1> rows[Parts];
  const auto half = [](const ExactPlace& place) { return place.half; };
  MC_NO_UNROLL
  for (int step = 0; step < 2; ++step) {
    MC_UNROLL
    for (int part = 0; part < Parts; ++part) planes.load(block, rows[part], part, step, half);
    multiply_add<Parts, false>(block, sum, rows, piece, step, half);
  }
}

// sum += rows M of all pieces for 128 columns from `matrix` on, rows in shared memory, through `staging` for two pieces.
// Begins with a sync.
template <class E, int Parts, class Block>
MC_HD void multiply_add_wide(Block& block, ExactSums<Block>& sum, const RowPlanes<E, Parts>& planes,
                             const ExactMatrix& matrix, FragmentA<E>* staging) {
  ExactRows<Block, E, 1> rows[Parts];
  const int apart = matrix.width > kExactColumns ? kPieceFragments<Parts> : 0;  // 0: both halves work on the same ones
  MC_NO_UNROLL
  for (int piece = 0; piece < exact_pieces(matrix.depth); ++piece) {
    block.sync();
    MC_NO_UNROLL
    for (int right = 0; right < 2; ++right) {
      if (right * kExactColumns < matrix.width)
        matrix.right_of(right * kExactColumns).stage<Parts, false>(block, piece, nullptr, staging + right * apart);
    }
    block.sync();
    MC_NO_UNROLL
    for (int n = 0; n < 4; ++n) {
      const auto half = [&](const ExactPlace&) { return n / 2; };
      MC_UNROLL
      for (int part = 0; part < Parts; ++part) planes.piece(piece).load(block, rows[part], part, n % 2, half);
      multiply_add<Parts, true>(block, sum, rows, staging, n % 2, half, apart);
    }
  }
}

// Results to shared memory [B, stride], columns from 0 to below `width`.
template <class Block>
MC_HD void store_wide(Block& block, const ExactSums<Block>& sum, int width, float* out, int stride) {
  block.each([&](Thread thread) {
    const ExactPlace place(thread);
    const int left = kExactColumns * place.half + place.column;
    MC_UNROLL
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int column = left + 16 * tile;
      if (column >= width) continue;
      float* const line = out + (place.row + 2 * place.t) * stride + column + place.g;
      MC_UNROLL
      for (int i = 0; i < 4 * kRowTiles; ++i)
        line[(8 * (i / 4) + i % 2) * stride + i % 4 / 2 * 8] = sum.tile[tile][i / 4](thread).x[i % 4];
    }
  });
}

constexpr int kExactSumBytes = 4 * kRowTiles * kTileThreads * 4;  // shared memory of `store_results`

// Once both halves of the depth are added, result * factors[column] - bias[column] to out [B, stride], columns from 0 to
// below `width`. `factors` (`Scaled`) and `bias`: [64] in shared memory. Nobody uses `exchange` any more.
template <bool Scaled, class Block>
MC_HD void store_results(Block& block, const ExactSums<Block>& sum, int width, void* exchange, const float* factors,
                         const float* bias, float* out, int stride) {
  float* const others = static_cast<float*>(exchange);  // [results][threads]
  block.each([&](Thread thread) {
    MC_UNROLL
    for (int i = 0; i < 4 * kRowTiles; ++i) others[i * kTileThreads + thread.index] = sum.tile[1][i / 4](thread).x[i % 4];
  });
  block.sync();
  block.each([&](Thread thread) {
    const ExactPlace place(forgotten(thread));
    const int column = place.column + 16 * place.half + place.g;  // and + 8
    if (16 * (column / 16) >= width) return;
    float* const line = out + ((place.row + 2 * place.t) * stride + column);
    const float* const other = others + (thread.index ^ kTileThreads / 2);
    MC_UNROLL
    for (int i = 0; i < 4 * kRowTiles; ++i) {
      const float total = sum.tile[0][i / 4](thread).x[i % 4] + other[i * kTileThreads];
      const int right = i % 4 / 2 * 8;
      const float factor = Scaled ? factors[column + right] : 1.0f;
      line[(8 * (i / 4) + i % 2) * stride + right] = total * factor - bias[column + right];
    }
  });
}

}  // namespace minicache
