// Full blocks of a group's layers into one stream's pools.
//
//   vectors x_i ──(un-rotated)──┬── matrices (linear, align): MapKernel ──► vectors in the workspace
//                               │     └── retention of linear merges: LossKernel ──► what each token loses
//                               └── norm per token: ProductsKernel ──► products of each head's vectors in the workspace
//   CompressKernel, a thread block per cache block and slot: merge, retention, segments, residuals
#pragma once

#include "minicache/prepare.cuh"
#include "minicache/retention.cuh"
#include "minicache/segments.cuh"

namespace minicache {

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
  static constexpr int kMinBlocks = Chunks <= 4 ? 2 : 1;

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
