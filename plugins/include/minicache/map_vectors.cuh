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
  bool resident;  // the matrices' columns stay in shared memory; otherwise blocks_each is 1

  MC_HD int members() const { return sums == 1 ? a.shape.members : 1; }
  MC_HD const float* matrix(int member, int slot) const {
    return matrices + (static_cast<std::int64_t>(member) * a.shape.heads + slot) * a.shape.dim * columns;
  }
  MC_HD float* results(int n, int sum, int slot) const {
    return out + ((static_cast<std::int64_t>(n) * sums + sum) * a.shape.heads + slot) * kBlockSize * columns;
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

  // Shared memory; `bytes` is its size.
  struct Scratch {
    float *scales, *inverses, *bias;  // [64]
    const T** rows;                   // [m] of the members
    void* exchange;                   // for the threads' maxima, turns and sums, in turn
    RowPlanes<E, kParts> planes;      // Turned
    FragmentA<E>* pieces;
    int bytes;

    MC_HD Scratch(char* base, const MapArguments<T>& a) {
      scales = reinterpret_cast<float*>(base);
      inverses = scales + kExactColumns;
      bias = inverses + kExactColumns;
      rows = reinterpret_cast<const T**>(bias + kExactColumns);
      exchange = rows + kMaxGroup;
      char* end = static_cast<char*>(exchange) + maximum(kExactSumBytes, kThreads * static_cast<int>(sizeof(Turn)));
      planes.numbers = reinterpret_cast<E*>(end);
      end += Turned ? RowPlanes<E, kParts>::kBytes : 0;
      pieces = reinterpret_cast<FragmentA<E>*>(end);
      end += (a.resident ? a.members() * exact_pieces(a.a.shape.dim) : 1) * kPieceBytes<kParts>;
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
      add_members(block, a, s, matrix, n, slot, sum, !kMayReside || n == start, total);
      store_results<kScaled>(block, total, width, s.exchange, s.inverses, s.bias, a.results(n, sum, slot) + first,
                             a.columns);
    }
  }

 private:
  struct PairedChunks {
    Bytes16 first, second;
  };

  template <class Block, class Matrix>
  MC_HD static void add_members(Block& block, const MapArguments<T>& a, const Scratch& s, Matrix matrix, int n, int slot,
                                int sum, bool stage, ExactSums<Block>& total) {
    const int dim = a.a.shape.dim, pieces = exact_pieces(dim), members = a.members();
    const Rotation back = a.a.rotation(n);
    FragmentA<E>* fragments = s.pieces;
    ExactRows<Block, E, 2> rows[1], next;
    typename Block::template PerThread<PairedChunks> chunks;
    block.each([&](Thread thread) {
      if (thread.index < members) s.rows[thread.index] = a.a.rows(n, sum + thread.index, slot);
    });
    block.sync();  // nor do others still read sums of the cache block before
    const auto load = [&](int piece, int member) {
      const T* const own = s.rows[member - sum];
#if MC_ON_DEVICE
      __builtin_assume(__isGlobal(own));
#endif
      if constexpr (Turned) {
        block.each([&](Thread thread) { chunks(thread) = load_pair(thread, own, dim, piece); });
      } else {
        load_rows(block, next, own, dim, piece);
      }
    };
    load(0, sum);
    MC_NO_UNROLL
    for (int piece = 0; piece < pieces; ++piece) {
      if constexpr (Turned) {
        block.each([&](Thread thread) { put_turn(s, thread, back, kHalfPiece * piece); });
      }
      MC_NO_UNROLL
      for (int member = sum; member < sum + members; ++member) {
        if (Turned || stage) block.sync();
        if constexpr (Turned) {
          turn(block, s, chunks, dim, piece);
        } else {
          rows[0] = next;
        }
        if (stage) matrix(member).template stage<kParts, kScaled>(block, piece, s.scales, fragments);
        if (Turned || stage) block.sync();
        // Reads of memory are under way while the tensor cores work.
        const bool last = member + 1 == sum + members;
        if (!last || piece + 1 < pieces) load(last ? piece + 1 : piece, last ? sum : member + 1);
        if constexpr (Turned) {
          multiply_add(block, total, s.planes, fragments);
        } else {
          multiply_add<kParts, false>(block, total, rows, fragments, 0, [](const ExactPlace& place) { return place.half; });
        }
        if (kMayReside && a.resident) fragments += kPieceFragments<kParts>;
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

  // A thread's turn of components from `first` on: cosines, then sines, in quarters [4][threads].
  MC_HD static void put_turn(const Scratch& s, Thread thread, const Rotation& rotation, int first) {
    const int component = first + component_of(thread, 0);
    if (2 * component >= rotation.dim) return;
    float* const own = static_cast<float*>(s.exchange) + 4 * thread.index;
    MC_NO_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      float* const place = own + e / 4 * 4 * kThreads + e % 4;
      rotation.turn_of(row_of(thread), component + e, place[2 * 4 * kThreads], place[0]);
    }
  }
  MC_HD static Turn turn_of(const Scratch& s, Thread thread) {
    const float* const own = static_cast<const float*>(s.exchange) + 4 * thread.index;
    Turn turn;
    MC_UNROLL
    for (int i = 0; i < 2; ++i) {
      load_four(turn.cosine + 4 * i, own + 4 * i * kThreads);
      load_four(turn.sine + 4 * i, own + 4 * (2 + i) * kThreads);
    }
    return turn;
  }

  // Un-rotates the threads' components: their parts to shared memory.
  template <class Block>
  MC_HD static void turn(Block& block, const Scratch& s,
                         const typename Block::template PerThread<PairedChunks>& chunks, int dim, int piece) {
    block.each([&](Thread thread) {
      const int component = component_of(thread, 0);
      float first[kChunk], second[kChunk];
      chunk_of<T>(first, chunks(thread).first);
      chunk_of<T>(second, chunks(thread).second);
      if (2 * (kHalfPiece * piece + component) < dim) turn_of(s, thread).apply(first, second);
      s.planes.store(row_of(thread), 0, component, first);
      s.planes.store(row_of(thread), 1, component, second);
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

  struct Scratch {
    SharedMap<T> map;
    float* rows;  // of turned keys
    int bytes;

    MC_HD Scratch(char* base, const StreamShape& shape) : map(base, shape.stored, shape.dim) {
      rows = reinterpret_cast<float*>(base + map.bytes);
      bytes = map.bytes + (turned(shape) ? 4 * kBlockSize * pitch_of(shape.dim) : 0);
    }
  };

  template <class Block>
  MC_HD static void run(Block& block, const CompressArguments<T>& a) {
    const Scratch s(block.shared, a.shape);
    const int n = block.x(), slot = block.y(), dim = a.shape.dim, stored = a.shape.stored;
    typename Block::template PerThread<float> lost, size;
    const float* const vectors = a.latent_vectors(n, slot);
    s.map.pad(block);
    block.each([&](Thread thread) {
      lost(thread) = size(thread) = 0.0f;
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < stored; component += kRowThreads * kChunk) {
        float x[kChunk];
        load_chunk(x, vectors + row_of(thread) * stored + component);
        s.map.store(row_of(thread), component, x);
      }
    });
    for (int member = 0; member < a.shape.members; ++member) {
      const std::int64_t place = static_cast<std::int64_t>(slot) * dim;
      const VectorSource<T> source = a.source(n, member, slot);
      if (source.rotation.turns()) {
        block.sync_warp();  // rows are those of their warps
        rows_to_shared(block, source, s.rows, pitch_of(dim));
      }
      for (int first = 0; first < dim; first += SharedMap<T>::kColumns) {
        s.map.multiply(block, a.maps.map[member] + place * stored, first);
        block.sync();
        measure(block, s, source, a.maps.offset[member] + place, first, lost, size);
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
  MC_HD static void measure(Block& block, const Scratch& s, const VectorSource<T>& source, const float* offset, int first,
                            typename Block::template PerThread<float>& lost,
                            typename Block::template PerThread<float>& size) {
    block.each([&](Thread thread) {
      const int row = row_of(thread), dim = source.dim;
      MC_NO_UNROLL
      for (int column = component_of(thread, 0); column < minimum(dim - first, SharedMap<T>::kColumns);
           column += kRowThreads * kChunk) {
        float x[kChunk], y[kChunk], constant[kChunk];
        if (source.rotation.turns()) {
          load_chunk(x, s.rows + row * pitch_of(dim) + first + column);
        } else {
          source.load(x, row, first + column);
        }
        load_chunk(y, s.map.chunk(row, column));
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
