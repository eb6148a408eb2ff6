// What compression computes before blocks are written: products with matrices, and sums over all heads of a token.
#pragma once

#include "minicache/dense.cuh"
#include "minicache/merge.cuh"

namespace minicache {

template <class T>
struct CompressArguments {
  StreamShape shape;
  StreamPools pools;
  WriteMaps maps;
  const T* layers[kMaxGroup];
  const std::int32_t* source_blocks;
  const std::int32_t* target_blocks;
  const std::int32_t* block_index;
  const float* inverse_frequencies;
  float shares[kMaxGroup];  // of the layers in a spherical mean
  float* vectors;           // linear: y [count, H, B, stored]; align: x_i A_i [count, m, H, B, D]; otherwise null
  float* statistics;        // [count, H, statistics_of(shape), B]

  // One member's vectors in the full tier, by slot.
  MC_HD const T* rows(int n, int member, int slot) const {
    const FullTier<T> tier{const_cast<T*>(layers[member]), shape.heads, shape.dim};
    const int head = maps.heads == nullptr ? slot : static_cast<int>(maps.heads[member * shape.heads + slot]);
    return tier.block(source_blocks[n], shape.part, head);
  }
  MC_HD VectorSource<T> source(int n, int member, int slot) const {
    const Rotation back{turned(shape) ? inverse_frequencies : nullptr, shape.dim, block_index[n] * kBlockSize, -1.0f};
    return VectorSource<T>{rows(n, member, slot), nullptr, shape.dim, back};
  }
  // As `source`, aligned.
  MC_HD VectorSource<T> aligned(int n, int member, int slot) const {
    if (!shape.align) return source(n, member, slot);
    return VectorSource<T>{nullptr, aligned_vectors(n, member, slot), shape.dim, Rotation{}};
  }
  MC_HD float* aligned_vectors(int n, int member, int slot) const {
    return vectors + ((static_cast<std::int64_t>(n) * shape.members + member) * shape.heads + slot) * kBlockSize * shape.dim;
  }
  MC_HD float* latent_vectors(int n, int slot) const {
    return vectors + (static_cast<std::int64_t>(n) * shape.heads + slot) * kBlockSize * shape.stored;
  }
  MC_HD float* statistic(int n, int slot, int number) const;
};

// Sums over a head's components that decide together with those of other heads (`norm` token), or what a linear merge
// loses: |x - x~|^2 and |x|^2. Numbers per token.
MC_HD int statistics_of(const StreamShape& shape) {
  if (shape.merge == Merge::linear) return shape.retained > 0 ? 2 : 0;
  return shape.norm == Norm::token && needs_angles(shape) ? pairs_of(shape.members) : 0;
}

template <class T>
MC_HD float* CompressArguments<T>::statistic(int n, int slot, int number) const {
  return statistics + ((static_cast<std::int64_t>(n) * shape.heads + slot) * statistics_of(shape) + number) * kBlockSize;
}

// Whether tiles are un-rotated through shared memory; products with matrices take their vectors un-rotated already.
MC_HD bool turns_tiles(const StreamShape& shape) {
  return turned(shape) && !shape.align && shape.merge != Merge::linear;
}

// x_i A_i. Grid: blocks, slots, members.
template <class T>
struct AlignKernel {
  static constexpr int kThreads = kTileThreads;

  MC_HD static int shared_bytes(const StreamShape& shape) {
    return static_cast<int>(sizeof(float)) * (kBlockSize * pitch_of(shape.dim) + kDenseFloats);
  }

  template <class Block>
  MC_HD static void run(Block& block, const CompressArguments<T>& a) {
    const int n = block.x(), slot = block.y(), member = block.z(), dim = a.shape.dim, pitch = pitch_of(dim);
    float* rows = reinterpret_cast<float*>(block.shared);
    float* staging = rows + kBlockSize * pitch;
    const std::int64_t place = static_cast<std::int64_t>(member) * a.shape.heads + slot;
    const DenseMatrix matrix{a.maps.align + place * dim * dim, dim, dim, false};
    float* out = a.aligned_vectors(n, member, slot);
    typename Block::template PerThread<Accumulator> sum;
    rows_to_shared(block, a.source(n, member, slot), rows, pitch);
    for (int first = 0; first < dim; first += kDenseColumns) {
      clear(block, sum);
      matrix.multiply_add(block, sum, rows, pitch, first, staging);
      visit_results(block, sum, first, dim,
                    [&](int row, int column, const float(&x)[4]) { store_four(out + row * dim + column, x); });
    }
  }
};

// y = sum_i x_i W_i - b and, for retention, what each token loses. Grid: blocks, slots.
template <class T>
struct EncodeKernel {
  static constexpr int kThreads = kTileThreads;

  MC_HD static int shared_bytes(const StreamShape& shape) {
    const int latent = shape.retained > 0 ? kBlockSize * pitch_of(shape.stored) : 0;
    return static_cast<int>(sizeof(float)) * (kBlockSize * pitch_of(shape.dim) + kDenseFloats + latent);
  }

  template <class Block>
  MC_HD static void run(Block& block, const CompressArguments<T>& a) {
    const int n = block.x(), slot = block.y(), stored = a.shape.stored, pitch = pitch_of(a.shape.dim);
    float* rows = reinterpret_cast<float*>(block.shared);
    float* staging = rows + kBlockSize * pitch;
    float* latent = a.shape.retained > 0 ? staging + kDenseFloats : nullptr;
    float* out = a.latent_vectors(n, slot);
    const float* bias = a.maps.bias + slot * stored;
    typename Block::template PerThread<Accumulator> sum;
    for (int first = 0; first < stored; first += kDenseColumns) {
      clear(block, sum);
      for (int member = 0; member < a.shape.members; ++member) {
        const std::int64_t place = static_cast<std::int64_t>(member) * a.shape.heads + slot;
        const DenseMatrix matrix{a.maps.encode + place * a.shape.dim * stored, a.shape.dim, stored, false};
        block.sync();
        rows_to_shared(block, a.source(n, member, slot), rows, pitch);
        matrix.multiply_add(block, sum, rows, pitch, first, staging);
      }
      visit_results(block, sum, first, stored, [&](int row, int column, float(&x)[4]) {
        MC_UNROLL
        for (int c = 0; c < 4; ++c) x[c] -= bias[column + c];
        store_four(out + row * stored + column, x);
        if (latent != nullptr) store_four(latent + row * pitch_of(stored) + column, x);
      });
    }
    if (latent != nullptr) measure_loss(block, a, n, slot, rows, latent, staging);
  }

 private:
  struct Loss {
    float lost[8], size[8];
  };

  template <class Block>
  MC_HD static void measure_loss(Block& block, const CompressArguments<T>& a, int n, int slot, float* rows,
                                 const float* latent, float* staging) {
    const int dim = a.shape.dim, stored = a.shape.stored, pitch = pitch_of(dim);
    typename Block::template PerThread<Accumulator> sum;
    typename Block::template PerThread<Loss> loss;
    block.each([&](Thread thread) { loss(thread) = Loss{}; });
    for (int member = 0; member < a.shape.members; ++member) {
      const std::int64_t place = static_cast<std::int64_t>(slot) * dim;
      const DenseMatrix matrix{a.maps.map[member] + place * stored, stored, dim, true};
      const float* offset = a.maps.offset[member] + place;
      block.sync();
      rows_to_shared(block, a.source(n, member, slot), rows, pitch);
      for (int first = 0; first < dim; first += kDenseColumns) {
        clear(block, sum);
        matrix.multiply_add(block, sum, latent, pitch_of(stored), first, staging);
        block.each([&](Thread thread) {
          const int column = first + dense_column(thread);
          if (column >= dim) return;
          MC_UNROLL
          for (int i = 0; i < 8; ++i) {
            const float* x = rows + dense_row(thread, i) * pitch + column;
            MC_UNROLL
            for (int c = 0; c < 4; ++c) {
              const float lost = x[c] - (sum(thread).x[i][c] + offset[column + c]);
              loss(thread).lost[i] += lost * lost;
              loss(thread).size[i] += x[c] * x[c];
            }
          }
        });
      }
    }
    store_loss(block, loss, a.statistic(n, slot, 0), a.statistic(n, slot, 1));
  }

  template <class Block>
  MC_HD static void store_loss(Block& block, typename Block::template PerThread<Loss>& loss, float* lost, float* size) {
    typename Block::template PerThread<float> total;
    MC_UNROLL
    for (int i = 0; i < 16; ++i) {
      block.each([&](Thread thread) { total(thread) = i < 8 ? loss(thread).lost[i % 8] : loss(thread).size[i % 8]; });
      block.template reduce_add<kWarp>(total);
      block.each([&](Thread thread) {
        if (thread.lane() == 0) (i < 8 ? lost : size)[dense_row(thread, i % 8)] = total(thread);
      });
    }
  }
};

// Products x_i . x_j of one head. Grid: blocks, slots.
template <class T, int Chunks>
struct ProductsKernel {
  static constexpr int kThreads = kTileThreads;

  MC_HD static int shared_bytes(const StreamShape& shape) {
    return turns_tiles(shape) ? static_cast<int>(sizeof(float)) * kBlockSize * pitch_of(shape.dim) : 0;
  }

  template <class Block>
  MC_HD static void run(Block& block, const CompressArguments<T>& a) {
    typename Block::template PerThread<Tile<Chunks>> first, second;
    const int n = block.x(), slot = block.y();
    measure_products<Chunks>(
        block, a.shape.members, [&](int member) { return a.aligned(n, member, slot); }, first, second,
        reinterpret_cast<float*>(block.shared), a.statistic(n, slot, 0));
  }
};

}  // namespace minicache
