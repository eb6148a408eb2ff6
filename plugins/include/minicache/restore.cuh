// A stream's blocks as its layer's keys (after RoPE) or values.
#pragma once

#include "minicache/rotation.cuh"
#include "minicache/shared_map.cuh"
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

// Shared memory of `RestoreKernel`; `bytes` is its size.
template <class T>
struct RestoreScratch {
  std::int32_t* places;  // [B]
  float* levels;         // of gaussian streams: [kLevels]
  SharedMap<T> map;      // products only
  float* rows;           // transforms without products: [B, pitch_of(D)]
  int bytes;
  static constexpr int kTables = 4 * (kBlockSize + kLevels);

  MC_HD RestoreScratch(char* base, const StreamShape& shape)
      : places(reinterpret_cast<std::int32_t*>(base)),
        levels(reinterpret_cast<float*>(places + kBlockSize)),
        map(base + kTables, shape.stored, shape.has_residual() ? shape.dim : 0, shape.dim,
            SharedMap<T>::products_of(shape.dim)),
        rows(reinterpret_cast<float*>(base + kTables)) {
    const int own = has_transforms(shape) ? 4 * kBlockSize * pitch_of(shape.dim) : 0;
    bytes = kTables + (takes_products(shape) ? map.bytes : own);
  }
};

// x = nu (y P^T + residual A^T) + c, rotated, with the retained vectors in their places. Grid: blocks, KV heads.
template <class T, int Chunks, bool Products>
struct RestoreKernel {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kMinBlocks = Products || Chunks == 4 ? 3 : 2;

  template <class Block>
  MC_HD static void run(Block& block, const RestoreArguments<T>& a) {
    if (a.blocks[block.x()] < 0) return;
    const StreamShape& shape = a.shape;
    const RestoreScratch<T> s(block.shared, shape);
    const int n = block.x(), head = block.y();
    const int slot = a.maps.slots == nullptr ? head : static_cast<int>(a.maps.slots[head]);
    const StreamBlock from{shape, a.pools, a.blocks[n]};
    if (shape.gaussian()) {
      block.each([&](Thread thread) { fill_levels(thread, s.levels); });
      block.sync();
    }
    if constexpr (Products) {
      multiply(block, a, from, slot, s);
    } else if (has_transforms(shape)) {
      latent_to_shared<T>(block, from, slot, s.levels, s.rows, pitch_of(shape.dim));
      undo_transforms<Chunks>(block, shape, s.rows, pitch_of(shape.dim));
      if (shape.has_residual()) add_residual(block, from, slot, s);
    }
    if (shape.retained > 0) find_retained(block, from, slot, s.places);
    block.sync();
    write(block, a, from, n, head, slot, s);
  }

 private:
  // y P^T + residual A^T.
  template <class Block>
  MC_HD static void multiply(Block& block, const RestoreArguments<T>& a, const StreamBlock& from, int slot,
                             const RestoreScratch<T>& s) {
    const StreamShape& shape = a.shape;
    s.map.pad(block);
    block.each([&](Thread thread) {
      const int row = row_of(thread);
      visit_latent<T>(thread, from, slot, s.levels, [&](int component, const float(&x)[kChunk]) {
        s.map.store_latent(row, component, x);
      });
      if (!shape.has_residual()) return;
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < shape.dim; component += kRowThreads * kChunk) {
        float x[kChunk];
        load_residual_chunk(x, from, slot, row, component);
        s.map.store_residual(row, component, x);
      }
    });
    const std::int64_t place = static_cast<std::int64_t>(slot) * shape.dim;
    const float* map = a.maps.map + (a.maps.map_heads == 1 ? 0 : place * shape.stored);
    const float* residual_map = shape.has_residual() ? a.maps.residual_map + place * shape.dim : nullptr;
    MC_NO_UNROLL
    for (int n = 0; n < SharedMap<T>::products_of(shape.dim); ++n)
      s.map.multiply(block, map, residual_map, n * SharedMap<T>::kColumns, n);
  }

  // Each thread to its own chunks of `rows`.
  template <class Block>
  MC_HD static void add_residual(Block& block, const StreamBlock& from, int slot, const RestoreScratch<T>& s) {
    block.each([&](Thread thread) {
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < from.shape.dim; component += kRowThreads * kChunk) {
        float x[kChunk], residual[kChunk];
        float* own = s.rows + row_of(thread) * pitch_of(from.shape.dim) + component;
        load_chunk(x, own);
        load_residual_chunk(residual, from, slot, row_of(thread), component);
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) x[e] += residual[e];
        store_chunk(own, x);
      }
    });
  }

  // Norm and offset of a slot's vectors; null where there are none.
  struct Affine {
    const Half* norms;
    const float* offset;

    MC_HD void apply(float (&x)[kChunk], int row, int component) const {
      if (norms == nullptr && offset == nullptr) return;
      const float norm = norms == nullptr ? 1.0f : to_float(norms[row]);
      float constant[kChunk] = {};
      if (offset != nullptr) load_chunk(constant, offset + component);
      MC_UNROLL
      for (int e = 0; e < kChunk; ++e) x[e] = x[e] * norm + constant[e];
    }
  };

  // Norm, offset, rotation, retained vectors.
  template <class Block>
  MC_HD static void write(Block& block, const RestoreArguments<T>& a, const StreamBlock& from, int n, int head, int slot,
                          const RestoreScratch<T>& s) {
    const StreamShape& shape = a.shape;
    const int dim = shape.dim;
    const bool shared = Products || has_transforms(shape);
    const Rotation rotation{turned(shape) ? a.inverse_frequencies : nullptr, dim,
                            turned(shape) ? a.block_index[n] * kBlockSize : 0, 1.0f};
    const Affine affine{shape.has_norms() ? from.norms(shape.gaussian() ? 0 : shape.member, slot) : nullptr,
                        a.maps.offset == nullptr ? nullptr : a.maps.offset + slot * dim};
    T* out = a.out + (static_cast<std::int64_t>(n) * shape.heads + head) * kBlockSize * dim;
    block.each([&](Thread thread) {
      const int row = row_of(thread), place = shape.retained > 0 ? s.places[row] : -1;
      const auto store = [&](const float(&x)[kChunk], int component) { store_chunk(out + row * dim + component, x); };
      const auto load = [&](float(&x)[kChunk], int component) {
        if (shared) {
          load_chunk(x, Products ? s.map.chunk(row, component) : s.rows + row * pitch_of(dim) + component);
        } else {
          load_numbers_of(x, from, slot, row, component, s.levels);
        }
        affine.apply(x, row, component);
      };
      if (place < 0 && rotation.turns()) {
        turn_row(thread, rotation, load, store);
        return;
      }
      if (place < 0 && !shared && !shape.has_residual() && shape.segments == 1 && has_ranges(shape.segment[0].format)) {
        write_numbers(thread, from, slot, [&](float(&x)[kChunk], int component) {
          affine.apply(x, row, component);
          store(x, component);
        });
        return;
      }
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < dim; component += kRowThreads * kChunk) {
        float x[kChunk];
        if (place >= 0) {
          load_exact_chunk<T>(x, from, slot, place, component);
        } else {
          load(x, component);
        }
        store(x, component);
      }
    });
  }

  // A row's chunks, where one segment of codes with ranges is all there is.
  template <class Store>
  MC_HD static void write_numbers(Thread thread, const StreamBlock& from, int slot, Store store) {
    const Segment& segment = from.shape.segment[0];
    const int row = row_of(thread), dim = from.shape.dim;
    const bool channel = segment.channel, integer = is_integer(segment.format);
    const Half* const scales = from.params(slot) + segment.scale;
    const Half* const minima = from.params(slot) + segment.minimum;
    const float scale = channel ? 0.0f : to_float(scales[row]);
    const float lowest = channel || !integer ? 0.0f : to_float(minima[row]);
    with_range_bits(segment.format, [&](auto bits) {
      constexpr int kWidth = decltype(bits)::value;
      const std::int8_t* const codes = from.codes(slot) + row * from.shape.code_bytes;
      MC_NO_UNROLL
      for (int component = component_of(thread, 0); component < dim; component += kRowThreads * kChunk) {
        float x[kChunk], factor[kChunk], low[kChunk];
        load_numbers<kWidth>(x, segment.format, codes + component / kChunk * kWidth);
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) {
          factor[e] = scale;
          low[e] = lowest;
        }
        if (channel) {
          load_chunk(factor, scales + component);
          if (integer) load_chunk(low, minima + component);
        }
        MC_UNROLL
        for (int e = 0; e < kChunk; ++e) x[e] = x[e] * factor[e] + low[e];
        store(x, component);
      }
    });
  }

  // A chunk of a row that takes neither products nor transforms.
  MC_HD static void load_numbers_of(float (&x)[kChunk], const StreamBlock& from, int slot, int row, int component,
                                    const float* levels) {
    load_latent_chunk<T>(x, from, slot, row, component, levels);
    if (!from.shape.has_residual()) return;
    float residual[kChunk];
    load_residual_chunk(residual, from, slot, row, component);
    MC_UNROLL
    for (int e = 0; e < kChunk; ++e) x[e] += residual[e];
  }
};

}  // namespace minicache
