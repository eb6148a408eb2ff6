// What compression computes before blocks are written: what its kernels share, and sums over all heads of a token.
#pragma once

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
  const float* rotations;   // of each block, `Rotation`s' tables; null: keys stay as they are
  float shares[kMaxGroup];  // of the layers in a spherical mean
  float* vectors;           // linear: y [count, H, B, stored]; align: x_i A_i [count, m, H, B, D]; otherwise null
  float* statistics;        // [count, H, statistics_of(shape), B]

  // One member's vectors in the full tier, by slot.
  MC_HD const T* rows(int n, int member, int slot) const {
    const FullTier<T> tier{const_cast<T*>(layers[member]), shape.heads, shape.dim};
    const int head = maps.heads == nullptr ? slot : static_cast<int>(maps.heads[member * shape.heads + slot]);
    return tier.block(source_blocks[n], shape.part, head);
  }
  MC_HD Rotation rotation(int n) const {
    return Rotation{rotations == nullptr ? nullptr : rotations + n * Rotation::numbers(shape.dim), shape.dim};
  }
  MC_HD VectorSource<T> source(int n, int member, int slot) const {
    return VectorSource<T>{rows(n, member, slot), nullptr, shape.dim, rotation(n)};
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
