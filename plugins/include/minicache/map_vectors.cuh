// Products of a group's vectors with calibrated matrices: encoding of linear merges, alignment, and what a linear merge
// loses.
#pragma once

#include "minicache/dense.cuh"
#include "minicache/exact_product.cuh"
#include "minicache/prepare.cuh"
#include "minicache/shared_map.cuh"

namespace minicache {

// sum_i x_i M_i - b of all members (encoding), or x_i M_i of each (alignment).
template <class T>
struct MapArguments {
  CompressArguments<T> a;
  const float* matrices;  // M [m, H, D, columns]
  const float* bias;      // b [H, columns]; null: none
  float* out;             // [count, sums, H, B, columns]
  std::int32_t columns;   // a multiple of 16
  std::int32_t sums;      // 1, or m: each member apart
  std::int32_t count, blocks_each;  // cache blocks, and how many of them a thread block takes
  bool resident;                    // the matrices' columns stay in shared memory; otherwise blocks_each is 1
  void* split;                      // MatrixPieces of the matrices, of keys that are un-rotated first

  MC_HD int members() const { return sums == 1 ? a.shape.members : 1; }
  MC_HD const float* matrix(int member, int slot) const {
    return matrices + (static_cast<std::int64_t>(member) * a.shape.heads + slot) * a.shape.dim * columns;
  }
  MC_HD float* results(int n, int sum, int slot) const {
    return out + ((static_cast<std::int64_t>(n) * sums + sum) * a.shape.heads + slot) * kBlockSize * columns;
  }
};

// Where pieces of 64 columns of split matrices lie: [m][H][columns / 64][pieces] of kPieceFragments.
template <class E, int Parts>
struct MatrixPieces {
  FragmentA<E>* fragments;
  int heads, chunks, pieces;

  template <class T>
  MC_HD static MatrixPieces of(const MapArguments<T>& a) {
    return {static_cast<FragmentA<E>*>(a.split), a.a.shape.heads, ceil_div(a.columns, kExactColumns),
            exact_pieces(a.a.shape.dim)};
  }
  MC_HD std::int64_t bytes(int members) const {
    return std::int64_t{members} * heads * chunks * pieces * kPieceBytes<Parts>;
  }
  MC_HD FragmentA<E>* at(int member, int slot, int chunk, int piece) const {
    const std::int64_t place = ((std::int64_t{member} * heads + slot) * chunks + chunk) * pieces + piece;
    return fragments + place * kPieceFragments<Parts>;
  }
};

// Grid: members and pieces, slots, 64 columns.
template <class T, class E, int Parts>
struct SplitMatrices {
  static constexpr int kThreads = kTileThreads;

  template <class Block>
  MC_HD static void run(Block& block, const MapArguments<T>& a) {
    const auto to = MatrixPieces<E, Parts>::of(a);
    const int member = block.x() / to.pieces, piece = block.x() % to.pieces, first = block.z() * kExactColumns;
    const ExactMatrix matrix{a.matrix(member, block.y()) + first, a.a.shape.dim, a.columns,
                             minimum(a.columns - first, kExactColumns)};
    matrix.template stage<Parts, false>(block, piece, nullptr, to.at(member, block.y(), block.z(), piece));
  }
};

// On the tensor cores; `Turned`: keys are un-rotated first. Grid: `blocks_each` cache blocks, slots, 64 columns of a sum.
template <class T, bool Turned>
struct MapKernel {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = 2;
  using E = std::conditional_t<Turned, BFloat16, T>;
  static constexpr bool kScaled = std::is_same_v<E, Half>;
  static constexpr int kParts = kScaled ? 2 : 3;  // of the matrix, and of turned rows
  // Whether a thread block may take several cache blocks; registers do not suffice where it turns keys.
  static constexpr bool kMayReside = !Turned;
  using Pieces = MatrixPieces<E, kParts>;
  static_assert(kExactSumBytes <= RowPlanes<E, kParts>::kBytes, "sums take the place of rows");

  // Shared memory; `bytes` is its size.
  struct Scratch {
    float *scales, *inverses, *bias;  // [64]
    const T** rows;                   // [m] of the members
    void* exchange;                   // for the threads' maxima and sums, in turn
    RowPlanes<E, kParts> planes;      // Turned
    FragmentA<E>* pieces;
    int bytes;

    MC_HD Scratch(char* base, const MapArguments<T>& a) {
      scales = reinterpret_cast<float*>(base);
      inverses = scales + kExactColumns;
      bias = inverses + kExactColumns;
      rows = reinterpret_cast<const T**>(bias + kExactColumns);
      exchange = rows + kMaxGroup;
      char* end = static_cast<char*>(exchange) + (Turned ? 0 : kExactSumBytes);
      planes.numbers = reinterpret_cast<E*>(end);  // Turned: sums take their place
      end += Turned ? RowPlanes<E, kParts>::kBytes : 0;
      pieces = reinterpret_cast<FragmentA<E>*>(end);
      end += (Turned ? 2 : a.resident ? a.members() * exact_pieces(a.a.shape.dim) : 1) * kPieceBytes<kParts>;
      bytes = static_cast<int>(end - base);
    }
  };

  MC_HD static int chunks_of(const MapArguments<T>& a) { return ceil_div(a.columns, kExactColumns); }

  template <class Block>
  MC_HD static void run(Block& block, const MapArguments<T>& a) {
    const Scratch s(block.shared, a);
    const int slot = block.y(), sum = block.z() / chunks_of(a), first = block.z() % chunks_of(a) * kExactColumns;
    const int each = kMayReside ? a.blocks_each : 1;
    const int start = block.x() * each, end = kMayReside ? minimum(start + each, a.count) : start + 1;
    const int width = minimum(a.columns - first, kExactColumns);
    const auto matrix = [&](int member) {
      return ExactMatrix{a.matrix(member, slot) + first, a.a.shape.dim, a.columns, width};
    };
    block.each([&](Thread thread) {
      if (thread.index < width) s.bias[thread.index] = a.bias == nullptr ? 0.0f : a.bias[slot * a.columns + first + thread.index];
    });
    if constexpr (kScaled) {
      typename Block::template PerThread<Bytes16> most;
      block.each([&](Thread thread) { most(thread) = Bytes16{}; });
      for (int member = sum; member < sum + a.members(); ++member) matrix(member).find_most(block, most);
      choose_scales(block, most, static_cast<Bytes16*>(s.exchange), s.scales, s.inverses);
    }
    ExactSums<Block> total;
    MC_NO_UNROLL
    for (int n = start; n < end; ++n) {
      clear(block, total);
      find_rows(block, a, s, n, slot, sum);
      if constexpr (Turned) {
        add_turned(block, a, s, a.a.rotation(n), slot, sum, first / kExactColumns, total);
        block.sync();
      } else {
        add_members(block, a, s, matrix, sum, !a.resident || n == start, total);
      }
      store_results<kScaled>(block, total, width, s.exchange, s.inverses, s.bias, a.results(n, sum, slot) + first,
                             a.columns);
    }
  }

 private:
  struct PairedChunks {
    Bytes16 first, second;
  };

  // Where the members' rows of a cache block are. Begins with a `sync`.
  template <class Block>
  MC_HD static void find_rows(Block& block, const MapArguments<T>& a, const Scratch& s, int n, int slot, int sum) {
    block.sync();  // nor do others still read sums of the cache block before
    block.each([&](Thread thread) {
      if (thread.index < a.members()) s.rows[thread.index] = a.a.rows(n, sum + thread.index, slot);
    });
    block.sync();
  }
  MC_HD static const T* rows_of(const Scratch& s, int member) {
    const T* const own = s.rows[member];
#if MC_ON_DEVICE
    __builtin_assume(__isGlobal(own));
#endif
    return own;
  }

  // Rows as they are. `stage`: the matrices are not in shared memory yet.
  template <class Block, class Matrix>
  MC_HD static void add_members(Block& block, const MapArguments<T>& a, const Scratch& s, Matrix matrix, int sum,
                                bool stage, ExactSums<Block>& total) {
    const int dim = a.a.shape.dim, pieces = exact_pieces(dim), members = a.members();
    FragmentA<E>* fragments = s.pieces;
    ExactRows<Block, E, 2> rows[1], next;
    load_rows(block, next, rows_of(s, 0), dim, 0);
    MC_NO_UNROLL
    for (int piece = 0; piece < pieces; ++piece) {
      MC_NO_UNROLL
      for (int member = 0; member < members; ++member) {
        if (stage) block.sync();
        rows[0] = next;
        if (stage) {
          matrix(sum + member).template stage<kParts, kScaled>(block, piece, s.scales, fragments);
          block.sync();
        }
        // Reads of memory are under way while the tensor cores work.
        const bool last = member + 1 == members;
        if (!last || piece + 1 < pieces) load_rows(block, next, rows_of(s, last ? 0 : member + 1), dim, piece + last);
        multiply_add<kParts, false>(block, total, rows, fragments, 0,
                                    [](const ExactPlace& place) { return place.half; });
        if (a.resident) fragments += kPieceFragments<kParts>;
      }
    }
  }

  // Rows un-rotated first; rows and pieces of the matrices arrive while the tensor cores work.
  template <class Block>
  MC_HD static void add_turned(Block& block, const MapArguments<T>& a, const Scratch& s, const Rotation& back, int slot,
                               int sum, int chunk, ExactSums<Block>& total) {
    const int dim = a.a.shape.dim, pieces = exact_pieces(dim), members = a.members();
    const Pieces matrices = Pieces::of(a);
    typename Block::template PerThread<PairedChunks> chunks;
    typename Block::template PerThread<Turn> turns;
    auto load = [&](int piece, int member) {
      block.each([&](Thread thread) { chunks(thread) = load_pair(thread, rows_of(s, member), dim, piece); });
    };
    auto fetch = [&](int piece, int member, FragmentA<E>* target) {
      const FragmentA<E>* const from = matrices.at(sum + member, slot, chunk, piece);
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int i = 0; i < kPieceFragments<kParts> / kThreads; ++i)
          Block::copy_async(target + i * kThreads + thread.index, from + i * kThreads + thread.index);
      });
      Block::commit_async();
    };
    FragmentA<E>*fragments = s.pieces, *others = s.pieces + kPieceFragments<kParts>;
    fetch(0, 0, fragments);
    load(0, 0);
    MC_NO_UNROLL
    for (int piece = 0; piece < pieces; ++piece) {
      MC_NO_UNROLL
      for (int member = 0; member < members; ++member) {
        const bool last = member + 1 == members, more = !last || piece + 1 < pieces;
        const int next_piece = last ? piece + 1 : piece, next_member = last ? 0 : member + 1;
        block.each([&](Thread thread) { turns(thread) = load_turn(thread, back, piece); });
        Block::template wait_async<0>();
        block.sync();  // nor do others still read what is overwritten now
        if (more) fetch(next_piece, next_member, others);
        turn(block, s, chunks, turns);
        block.sync();
        if (more) load(next_piece, next_member);
        multiply_add(block, total, s.planes, fragments);
        FragmentA<E>* const read = fragments;
        fragments = others;
        others = read;
      }
    }
  }

  // Eight components of the thread's row and those they are paired with.
  MC_HD static PairedChunks load_pair(Thread thread, const T* rows, int dim, int piece) {
    const int component = kHalfPiece * piece + component_of(thread, 0);
    if (2 * component >= dim) return PairedChunks{};
    const T* const own = rows + row_of(thread) * dim + component;
    return PairedChunks{load_as<Bytes16>(own), load_as<Bytes16>(own + dim / 2)};
  }

  MC_HD static Turn load_turn(Thread thread, const Rotation& back, int piece) {
    const int component = kHalfPiece * piece + component_of(thread, 0);
    return 2 * component < back.dim ? back.turn_of(row_of(thread), component) : Turn{};
  }

  // Un-rotates the threads' components: their parts to shared memory.
  template <class Block>
  MC_HD static void turn(Block& block, const Scratch& s, const typename Block::template PerThread<PairedChunks>& chunks,
                         const typename Block::template PerThread<Turn>& turns) {
    block.each([&](Thread thread) {
      float first[kChunk], second[kChunk];
      chunk_of<T>(first, chunks(thread).first);
      chunk_of<T>(second, chunks(thread).second);
      turns(thread).apply(first, second);
      s.planes.store(row_of(thread), 0, component_of(thread, 0), first);
      s.planes.store(row_of(thread), 1, component_of(thread, 0), second);
    });
  }
};

// In float32 multiply-adds, 128 columns at a time. Grid: blocks, slots, sums.
template <class T>
struct FloatMapKernel {
  static constexpr int kThreads = kTileThreads;

  MC_HD static int shared_bytes(const MapArguments<T>& a) {
    return static_cast<int>(sizeof(float)) * (kBlockSize * pitch_of(a.a.shape.dim) + kDenseFloats);
  }

  template <class Block>
  MC_HD static void run(Block& block, const MapArguments<T>& a) {
    const int n = block.x(), slot = block.y(), sum = block.z(), dim = a.a.shape.dim, pitch = pitch_of(dim);
    float* rows = reinterpret_cast<float*>(block.shared);
    float* const out = a.results(n, sum, slot);
    const float* const bias = a.bias == nullptr ? nullptr : a.bias + slot * a.columns;
    typename Block::template PerThread<Accumulator> total;
    for (int first = 0; first < a.columns; first += kDenseColumns) {
      clear(block, total);
      for (int member = 0; member < a.members(); ++member) {
        block.sync();
        rows_to_shared(block, a.a.source(n, sum + member, slot), rows, pitch);
        const DenseMatrix matrix{a.matrix(sum + member, slot), dim, a.columns, false};
        matrix.multiply_add(block, total, rows, pitch, first, rows + kBlockSize * pitch);
      }
      visit_results(block, total, first, a.columns, [&](int row, int column, float(&x)[4]) {
        MC_UNROLL
        for (int c = 0; c < 4; ++c) {
          if (bias != nullptr) x[c] -= bias[column + c];
        }
        store_four(out + row * a.columns + column, x);
      });
    }
  }
};

// |x - x~|^2 and |x|^2 of every token, of all members together: what a linear merge loses. Grid: blocks, slots.
template <class T>
struct LossKernel {
  static constexpr int kThreads = kTileThreads;

  // In shared memory.
  MC_HD static SharedMap<T> map_of(char* base, const StreamShape& shape) { return {base, shape.stored, shape.dim}; }

  template <class Block>
  MC_HD static void run(Block& block, const CompressArguments<T>& a) {
    const SharedMap<T> map = map_of(block.shared, a.shape);
    const int n = block.x(), slot = block.y(), dim = a.shape.dim, stored = a.shape.stored;
    typename Block::template PerThread<float> lost, size;
    const float* const vectors = a.latent_vectors(n, slot);
    map.pad(block);
    block.each([&](Thread thread) {
      lost(thread) = size(thread) = 0.0f;
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < stored; component += kRowThreads * kChunk) {
        float x[kChunk];
        load_chunk(x, vectors + row_of(thread) * stored + component);
        map.store(row_of(thread), component, x);
      }
    });
    for (int member = 0; member < a.shape.members; ++member) {
      const std::int64_t place = static_cast<std::int64_t>(slot) * dim;
      const VectorSource<T> source = a.source(n, member, slot);
      for (int first = 0; first < dim; first += SharedMap<T>::kColumns) {
        map.multiply(block, a.maps.map[member] + place * stored, first);
        block.sync();
        measure(block, map, source, a.maps.offset[member] + place, first, lost, size);
      }
    }
    block.template reduce_add<kRowThreads>(lost);
    block.template reduce_add<kRowThreads>(size);
    block.each([&](Thread thread) {
      if (!leads_row(thread)) return;
      a.statistic(n, slot, 0)[row_of(thread)] = lost(thread);
      a.statistic(n, slot, 1)[row_of(thread)] = size(thread);
    });
  }

 private:
  template <class Block>
  MC_HD static void measure(Block& block, const SharedMap<T>& map, const VectorSource<T>& source, const float* offset,
                            int first, typename Block::template PerThread<float>& lost,
                            typename Block::template PerThread<float>& size) {
    block.each([&](Thread thread) {
      const int row = row_of(thread), dim = source.dim;
      MC_NO_UNROLL
      for (int column = component_of(thread, 0); column < minimum(dim - first, SharedMap<T>::kColumns);
           column += kRowThreads * kChunk) {
        float x[kChunk], y[kChunk], constant[kChunk];
        source.load_unrotated(x, row, first + column);
        load_chunk(y, map.chunk(row, column));
        load_chunk(constant, offset + first + column);
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) {
          const float rest = x[e] - (y[e] + constant[e]);
          lost(thread) += rest * rest;
          size(thread) += x[e] * x[e];
        }
      }
    });
  }
};

}  // namespace minicache
