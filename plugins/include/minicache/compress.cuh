// Full blocks of a group's layers into one stream's pools.
//
//   vectors x_i ──(un-rotated)──┬── matrices: EncodeKernel (linear), AlignKernel ──► vectors in the workspace
//                               └── norm per token: ProductsKernel ──► products of each head's vectors in the workspace
//   CompressKernel, a thread block per cache block and slot: merge, retention, segments, residuals
#pragma once

#include "minicache/dense.cuh"
#include "minicache/merge.cuh"
#include "minicache/retention.cuh"
#include "minicache/segments.cuh"

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

// Shared memory of `CompressKernel`; `bytes` is its size.
struct CompressScratch {
  MergeScratch merge;
  RetentionScratch retention;
  SegmentScratch segments;
  int bytes;

  MC_HD CompressScratch(char* base, const StreamShape& shape) : bytes(0) {
    const int members = shape.members, width = maximum(shape.rank, shape.dim);
    const bool angles = needs_angles(shape), slerp = shape.merge == Merge::slerp;
    const bool channel = has_channel_ranges(shape);
    const bool tile = channel || shape.has_residual() || turns_tiles(shape) ||
                      (shape.merge != Merge::linear && hadamard_needs_shared(shape));
    segments.codes = take<std::int8_t>(base, kBlockSize * maximum(shape.code_bytes, shape.residual_bytes()));
    segments.columns.pitch = pitch_of(width);
    segments.columns.tile = take<float>(base, tile ? kBlockSize * pitch_of(width) : 0);
    segments.columns.ranges = take<float>(base, channel ? 3 * kMaxRank : 0);
    segments.norms = take<float>(base, kBlockSize);
    merge.products = take<float>(base, angles ? pairs_of(members) * kBlockSize : 0);
    merge.weight = take<float>(base, angles ? members * kBlockSize : 0);
    merge.inverse = take<float>(base, angles ? members * kBlockSize : 0);
    merge.step = take<float>(base, slerp ? members * kBlockSize : 0);
    merge.score = retention.score = take<float>(base, kBlockSize);
    retention.rank = take<float>(base, kBlockSize);
    retention.index = take<std::int32_t>(base, kBlockSize / 2);
    segments.kept = retention.kept = take<std::int32_t>(base, kBlockSize);
  }

 private:
  template <class Number>
  MC_HD Number* take(char* base, int count) {
    Number* result = reinterpret_cast<Number*>(base + bytes);
    bytes += (count * static_cast<int>(sizeof(Number)) + 15) / 16 * 16;
    return result;
  }
};

// Everything a stream stores of one cache block and slot. Grid: blocks, slots.
template <class T, int Chunks>
struct CompressKernel {
  static constexpr int kThreads = kTileThreads;

  template <class Block>
  MC_HD static void run(Block& block, const CompressArguments<T>& a) {
    typename Block::template PerThread<Tile<Chunks>> latent, other;
    const StreamShape& shape = a.shape;
    const CompressScratch s(block.shared, shape);
    const int n = block.x(), slot = block.y();
    const StreamBlock to{shape, a.pools, a.target_blocks[n]};
    // Norms and retained positions that all heads share are written once.
    const bool owner = shape.norm == Norm::head || slot == 0;
    merge(block, a, n, slot, s, to, owner, latent, other);
    if (shape.retained > 0) {
      choose_retained(block, shape, s.retention, a.block_index[n] == 0);
      block.each([&](Thread thread) {
        if (owner && thread.index < shape.retained)
          to.retained_index(slot)[thread.index] = static_cast<std::int8_t>(s.retention.index[thread.index]);
      });
      store_exact<T>(block, to, slot, s.retention.index, [&](int member) { return a.rows(n, member, slot); });
    } else {
      block.each([&](Thread thread) {
        if (thread.index < kBlockSize) s.retention.kept[thread.index] = 0;
      });
    }
    if (shape.has_residual()) store_residuals(block, a, n, slot, s, to, latent, other);
    block.sync();
    store_segments<T, Chunks>(block, to, slot, latent, s.segments);
  }

 private:
  template <class Block>
  using Tiles = typename Block::template PerThread<Tile<Chunks>>;

  template <class Block>
  MC_HD static void merge(Block& block, const CompressArguments<T>& a, int n, int slot, const CompressScratch& s,
                          const StreamBlock& to, bool owner, Tiles<Block>& latent, Tiles<Block>& other) {
    const StreamShape& shape = a.shape;
    const auto source = [&](int member) { return a.aligned(n, member, slot); };
    if (shape.merge == Merge::linear) {
      const float* vectors = a.latent_vectors(n, slot);
      load_tile<Chunks>(block, latent, shape.stored, [&](float(&x)[kChunk], int row, int component) {
        load_chunk(x, vectors + row * shape.stored + component);
      });
      if (shape.retained > 0) relative_errors(block, a, n, slot, s.merge.score);
      return;
    }
    float* shared = s.segments.columns.tile;
    const bool angles = needs_angles(shape);
    const bool shared_directions = statistics_of(shape) > 0;
    if (angles && shared_directions) {
      add_heads(block, a, n, s.merge.products);
    } else if (angles) {
      measure_products<Chunks>(block, shape.members, source, latent, other, shared, s.merge.products);
      block.sync();
    }
    if (angles) {
      solve(block, a, s.merge, to, slot, owner);
      block.sync();
    }
    const bool loaded = angles && !shared_directions && shape.members == 2;
    combine<Chunks>(block, shape, source, s.merge, latent, other, shared, loaded);
  }

  template <class Block>
  MC_HD static void solve(Block& block, const CompressArguments<T>& a, const MergeScratch& s, const StreamBlock& to,
                          int slot, bool owner) {
    const StreamShape& shape = a.shape;
    const bool slerp = shape.merge == Merge::slerp;
    block.each([&](Thread thread) {
      if (thread.index >= kBlockSize) return;
      const AngleSolver solver{s, shape.members, thread.index};
      const bool meaningful = solver.normalise([&](int member, float norm) {
        if (slerp && owner) to.norms(member, slot)[thread.index] = saturate_half(norm);
      });
      if (slerp) solver.solve(shape.t, a.shares, meaningful);
    });
  }

  // Products of all heads together, in the order of the heads.
  template <class Block>
  MC_HD static void add_heads(Block& block, const CompressArguments<T>& a, int n, float* products) {
    const int count = statistics_of(a.shape) * kBlockSize;
    block.each([&](Thread thread) {
      for (int i = thread.index; i < count; i += kThreads) {
        float sum = 0.0f;
        for (int slot = 0; slot < a.shape.heads; ++slot) sum += a.statistic(n, slot, 0)[i];
        products[i] = sum;
      }
    });
    block.sync();
  }

  // |x - x~| / |x| of every token, of one head or of all.
  template <class Block>
  MC_HD static void relative_errors(Block& block, const CompressArguments<T>& a, int n, int slot, float* score) {
    const bool together = a.shape.norm == Norm::token;
    block.each([&](Thread thread) {
      if (thread.index >= kBlockSize) return;
      float lost = 0.0f, size = 0.0f;
      for (int head = together ? 0 : slot; head < (together ? a.shape.heads : slot + 1); ++head) {
        lost += a.statistic(n, head, 0)[thread.index];
        size += a.statistic(n, head, 1)[thread.index];
      }
      const float ratio = size > 0.0f ? divide(square_root(lost), square_root(size)) : 0.0f;
      score[thread.index] = minimum(ratio, kFirstScore);
    });
    block.sync();
  }

  // x_i / |x_i| - e of every member; rows pass through shared memory, each by its own four threads.
  template <class Block>
  MC_HD static void store_residuals(Block& block, const CompressArguments<T>& a, int n, int slot,
                                    const CompressScratch& s, const StreamBlock& to, Tiles<Block>& latent,
                                    Tiles<Block>& residual) {
    const StreamShape& shape = a.shape;
    const ColumnScratch& columns = s.segments.columns;
    const int row_bytes = shape.residual_bytes();
    for (int member = 0; member < shape.members; ++member) {
      load_vectors<Chunks>(block, residual, a.aligned(n, member, slot), columns.tile);
      block.each([&](Thread thread) {
        const float inverse = s.merge.inverse[member * kBlockSize + row_of(thread)];
        MC_UNROLL
        for (int j = 0; j < Chunks; ++j) {
          MC_UNROLL
          for (int e = 0; e < kChunk; ++e)
            residual(thread).x[j][e] = residual(thread).x[j][e] * inverse - latent(thread).x[j][e];
        }
      });
      block.sync();
      tile_to_shared<Chunks>(block, residual, columns.tile, columns.pitch, 0, shape.dim);
      const auto load = [&](float(&x)[kChunk], int row, int component) {
        load_chunk(x, columns.tile + row * columns.pitch + component);
      };
      Half* params = to.residual_params(member, slot);
      quantize_rows(block, shape.dim, shape.residual, load, [&](int row) {
        return RowTarget{s.segments.codes + row * row_bytes, params + row, params + kBlockSize + row};
      });
      block.sync();
      copy_bytes(block, to.residual(member, slot), s.segments.codes, kBlockSize * row_bytes);
    }
  }
};

}  // namespace minicache
