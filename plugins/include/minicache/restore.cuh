// A stream's blocks as its layer's keys (after RoPE) or values.
#pragma once

#include "minicache/dense.cuh"
#include "minicache/rotation.cuh"
#include "minicache/stream_tile.cuh"

namespace minicache {

template <class T>
struct RestoreArguments {
  StreamShape shape;
  StreamPools pools;
  ReadMaps maps;
  const std::int32_t* blocks;         // negative: nothing is written
  const std::int32_t* block_index;    // of each block in its sequence; null unless keys are in the pre_rope basis
  const float* inverse_frequencies;
  T* out;  // [count, H, B, D], by KV head
};

// Whether restoring takes products with the layer's maps; a transform alone is undone by butterflies.
MC_HD bool takes_products(const StreamShape& shape) { return shape.merge == Merge::linear || shape.align; }

MC_HD bool turned(const StreamShape& shape) { return shape.part == Part::key && shape.basis == Basis::pre_rope; }

// Shared memory of `RestoreKernel`; `bytes` is its size.
struct RestoreScratch {
  std::int32_t* places;  // [B]
  float* staging;
  float* latent;         // [B, pitch_of(stored)], products only
  float* residual;       // [B, pitch_of(D)], products with residuals only
  float* rows;           // [B, pitch_of(D)]: restored vectors, or scratch of transforms
  int bytes;

  MC_HD RestoreScratch(char* base, const StreamShape& shape) {
    const bool products = takes_products(shape);
    const int row_floats = kBlockSize * pitch_of(shape.dim);
    const int latent_floats = products ? kBlockSize * pitch_of(shape.stored) : 0;
    // Results of a product with at most 128 columns are all in registers before they are written.
    const bool apart = products && shape.dim > kDenseColumns;
    const bool rows_needed = !products && (turned(shape) || hadamard_needs_shared(shape));
    places = reinterpret_cast<std::int32_t*>(base);
    staging = reinterpret_cast<float*>(places + kBlockSize);
    residual = staging + (products ? kDenseFloats : 0);
    latent = residual + (products && shape.has_residual() ? row_floats : 0);
    rows = apart ? latent + latent_floats : latent;
    const int shared_floats = maximum(latent_floats, products || rows_needed ? row_floats : 0);
    const float* end = apart ? rows + row_floats : latent + shared_floats;
    bytes = static_cast<int>(reinterpret_cast<const char*>(end) - base);
  }
};

// x = nu (y P^T + residual A^T) + c, rotated, with the retained vectors in their places. Grid: blocks, KV heads.
template <class T, int Chunks>
struct RestoreKernel {
  static constexpr int kThreads = kTileThreads;

  template <class Block>
  MC_HD static void run(Block& block, const RestoreArguments<T>& a) {
    if (a.blocks[block.x()] < 0) return;
    typename Block::template PerThread<Tile<Chunks>> tile;
    const StreamShape& shape = a.shape;
    const RestoreScratch s(block.shared, shape);
    const int n = block.x(), head = block.y();
    const int slot = a.maps.slots == nullptr ? head : static_cast<int>(a.maps.slots[head]);
    const StreamBlock from{shape, a.pools, a.blocks[n]};
    const int pitch = pitch_of(shape.dim);
    if (takes_products(shape)) {
      multiply(block, a, from, slot, s, tile);
    } else {
      load_latent<T, Chunks>(block, from, slot, false, tile, s.rows, pitch);
      if (shape.has_residual()) add_residual(block, from, slot, tile);
      if (turned(shape)) {
        block.sync();
        tile_to_shared<Chunks>(block, tile, s.rows, pitch, 0, shape.dim);
      }
    }
    if (shape.retained > 0) find_retained(block, from, slot, s.places);
    block.sync();
    write(block, a, from, n, head, slot, s, tile);
  }

 private:
  template <class Block>
  using Tiles = typename Block::template PerThread<Tile<Chunks>>;

  // y P^T + residual A^T to `rows`.
  template <class Block>
  MC_HD static void multiply(Block& block, const RestoreArguments<T>& a, const StreamBlock& from, int slot,
                             const RestoreScratch& s, Tiles<Block>& tile) {
    const StreamShape& shape = a.shape;
    const int dim = shape.dim, stored = shape.stored, pitch = pitch_of(dim);
    load_latent<T, Chunks>(block, from, slot, true, tile, nullptr, 0);
    tile_to_shared<Chunks>(block, tile, s.latent, pitch_of(stored), 0, stored);
    const std::int64_t place = static_cast<std::int64_t>(slot) * dim;
    const DenseMatrix map{a.maps.map + (a.maps.map_heads == 1 ? 0 : place * stored), stored, dim, true};
    const DenseMatrix residual_map{a.maps.residual_map + place * dim, dim, dim, true};
    if (shape.has_residual()) {
      load_residual<Chunks>(block, from, slot, tile);
      tile_to_shared<Chunks>(block, tile, s.residual, pitch, 0, dim);
    }
    typename Block::template PerThread<Accumulator> sum;
    for (int first = 0; first < dim; first += kDenseColumns) {
      clear(block, sum);
      map.multiply_add(block, sum, s.latent, pitch_of(stored), first, s.staging);
      if (shape.has_residual()) residual_map.multiply_add(block, sum, s.residual, pitch, first, s.staging);
      block.sync();
      visit_results(block, sum, first, dim,
                    [&](int row, int column, const float(&x)[4]) { store_four(s.rows + row * pitch + column, x); });
    }
  }

  template <class Block>
  MC_HD static void add_residual(Block& block, const StreamBlock& from, int slot, Tiles<Block>& tile) {
    typename Block::template PerThread<Tile<Chunks>> residual;
    load_residual<Chunks>(block, from, slot, residual);
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) tile(thread).x[j][e] += residual(thread).x[j][e];
      }
    });
  }

  // Norm, offset, rotation, retained vectors.
  template <class Block>
  MC_HD static void write(Block& block, const RestoreArguments<T>& a, const StreamBlock& from, int n, int head, int slot,
                          const RestoreScratch& s, Tiles<Block>& tile) {
    const StreamShape& shape = a.shape;
    const int dim = shape.dim, pitch = pitch_of(dim);
    const bool rotated = turned(shape), in_shared = rotated || takes_products(shape);
    const Rotation rotation{a.inverse_frequencies, dim, rotated ? a.block_index[n] * kBlockSize : 0, 1.0f};
    const Half* norms = shape.has_norms() ? from.norms(shape.gaussian() ? 0 : shape.member, slot) : nullptr;
    const float* offset = a.maps.offset == nullptr ? nullptr : a.maps.offset + slot * dim;
    T* out = a.out + (static_cast<std::int64_t>(n) * shape.heads + head) * kBlockSize * dim;
    const auto finish = [&](float(&x)[kChunk], float norm, int component) {
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) x[e] = x[e] * norm + (offset == nullptr ? 0.0f : offset[component + e]);
    };
    block.each([&](Thread thread) {
      const int row = row_of(thread), place = shape.retained > 0 ? s.places[row] : -1;
      const float norm = norms == nullptr ? 1.0f : to_float(norms[row]);
      const float* own = s.rows + row * pitch;
      MC_UNROLL
      for (int j = 0; j < Chunks; ++j) {
        const int component = component_of(thread, j);
        if (component >= dim) continue;
        float(&x)[kChunk] = tile(thread).x[j];
        if (place >= 0) {
          load_exact_chunk<T>(x, from, slot, place, component);
        } else {
          if (in_shared) load_chunk(x, own + component);
          finish(x, norm, component);
          if (rotated) {
            float other[kChunk];
            load_chunk(other, own + rotation.partner(component));
            finish(other, norm, rotation.partner(component));
            rotation.apply(x, other, row, component);
          }
        }
        store_chunk(out + row * dim + component, x);
      }
    });
  }
};

}  // namespace minicache
