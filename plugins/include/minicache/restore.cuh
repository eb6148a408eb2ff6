// A stream's blocks as its layer's keys (after RoPE) or values: rebuilt as decode attention rebuilds keys, then turned.
//
//     MapFragments ─► RestoreKernel
//     (maps and turns, once a call)
//
// Stored numbers, maps and turns are binary16 on the way, of either 16-bit type; sums of products are floats.
#pragma once

#include "minicache/map_fragments.cuh"
#include "minicache/retained_rows.cuh"

namespace minicache {

template <class E>
using StepTurns = Neighbours<TurnPair<E>, 2>;  // of a thread's four components of a step

// Cosines and sines of the positions of blocks: [blocks][kBlockSize][padded half / 2] `TurnPair`s. Angles are rounded
// as models round them, so that keys are turned by what they were turned back by.
template <class T>
struct BlockTurns {
  using E = Code<T>;
  const float* inverse_frequencies;
  const std::int32_t* blocks;       // negative: left out
  const std::int32_t* block_index;  // of each block in its sequence
  TurnPair<E>* out;

  MC_HD static int pairs(int dim) { return padded_half(dim) / 2; }
  MC_HD static std::int64_t bytes(int dim, std::int32_t count) {
    return std::int64_t{count} * kBlockSize * pairs(dim) * static_cast<std::int64_t>(sizeof(TurnPair<E>));
  }

  // Of a place in a block, by the lanes of a warp; nothing in the padding.
  MC_HD void fill(int dim, int block, int place, int lane) const {
    if (blocks[block] < 0) return;
    const auto position = static_cast<float>(block_index[block] * kBlockSize + place);
    TurnPair<E>* const row = out + (std::int64_t{block} * kBlockSize + place) * pairs(dim);
    MC_NO_UNROLL
    for (int pair = lane; pair < dim / 4; pair += kWarp) {
      float sine[2], cosine[2];
      MC_UNROLL
      for (int i = 0; i < 2; ++i) {
        sine_and_cosine_approximate(multiply(position, inverse_frequencies[2 * pair + i]), sine[i], cosine[i]);
      }
      row[pair] = {round_pair<E>(cosine[0], cosine[1]), round_pair<E>(sine[0], sine[1])};
    }
  }
};

// Where things lie in a thread block's shared memory: byte offsets.
struct RestoreShared {
  std::int32_t block_bytes, stage_bytes, stages;  // of a cache block in a stage; of a stage; how many
  std::int32_t map, rows, offset, places, bytes;
  bool map_in_shared;
};

template <class T>
RestoreShared restore_shared(const StreamReader& reader, int stages, bool map_in_shared) {
  const StreamShape& shape = reader.shape;
  const int kind = kind_of(shape, shape);
  RestoreShared shared{};
  SharedFields field;
  shared.block_bytes = reader.stage.bytes;  // whole units of 128
  shared.stage_bytes = rebuilt_blocks(kind) * shared.block_bytes;
  shared.stages = stages;
  field(std::int64_t{stages} * shared.stage_bytes);
  shared.map_in_shared = map_in_shared;
  shared.map = field(map_in_shared ? rebuild_fragments<T>(shape) * sizeof(FragmentB<Code<T>>) : 0);
  shared.rows = field(kind == kPlain ? StoredRows::bytes<T>(shape) : 0);
  shared.offset = field(RebuildMap::offset_bytes(shape.dim));
  shared.places = field(shape.retained > 0 ? kBlockSize * 4 : 0);
  shared.bytes = field.bytes;
  return shared;
}

template <class T>
struct RestoreArguments {
  StreamReader reader;
  const std::int32_t* blocks;  // negative: nothing is written
  std::int32_t count;
  std::int32_t groups;             // of thread blocks, which share the cache blocks
  const void* map_fragments;       // of every slot
  const TurnPair<Code<T>>* turns;  // BlockTurns; null: keys stay as they are
  T* out;                          // [count, H, B, D], by KV head
  RestoreShared shared;
};

// Thread block: (group, KV head). Kind: what is known of the stream.
template <class T, int Kind>
struct RestoreKernel {
  static constexpr int kThreads = kDecodeThreads;
  // More would spill registers.
  static constexpr bool kFour = Kind == 64 && (kArch == 900 || kArch == 0);
  static constexpr bool kTwo = !holds_rows(Kind) || (Kind == kPlain && kArch >= 1000);
  static constexpr int kMinBlocks = kFour ? 4 : kTwo ? 2 : 3;
  static constexpr int kTiles = rebuilt_blocks(Kind);
  using Arguments = RestoreArguments<T>;
  using E = Code<T>;

  template <class Block>
  MC_HD static void run(Block& block, const Arguments& a) {
    using Source = StageSource<T, Kind, Part::key>;  // rows are read as those of keys are
    const int head = block.y(), slot = a.reader.slot(head), rounds = ceil_div(a.count, kTiles);
    const auto rebuild = RowRebuild::of<T, Kind>(block, a.reader, a.map_fragments, slot, a.shared);
    auto block_of = [&](int u, int m) {
      const int n = u * kTiles + m;
      return n < a.count ? a.blocks[n] : -1;
    };
    StageRing stages(block.shared, a.shared.stage_bytes, a.shared.stages);
    auto fetch = [&](int u) {
      char* const stage = stages.to_fill();
      block.each([&](Thread thread) {
        const Source source = Source::of(thread, a.reader, slot);  // each time: not in registers while rows are rebuilt
        MC_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          const int id = block_of(u, m);
          if (id >= 0) source.template fetch<Block>(thread, a.reader, stage + m * a.shared.block_bytes, id);
        }
      });
      Block::commit_async();
    };
    rebuild.map.template fetch<T>(block, a.reader);  // arrives with the first stage
    rebuild.template prepare<T, Kind>(block, a.reader, slot, true);
    for (int n = 0; n < a.shared.stages - 1; ++n) fetch(block.x() + n * a.groups);
    with_formats<Kind>(a.reader, [&](auto formats) {
      for (int u = block.x(); u < rounds; u += a.groups) {
        if (a.shared.stages == 1) {
          block.sync();  // nobody reads it any more
          fetch(u);
        }
        wait_stage(block, a.shared.stages);
        if (a.shared.stages > 1) fetch(u + (a.shared.stages - 1) * a.groups);
        const char* const stage = stages.to_read();
        bool wanted[kTiles], any = false;
        MC_UNROLL
        for (int m = 0; m < kTiles; ++m) any |= wanted[m] = block_of(u, m) >= 0;
        if (any) restore<decltype(formats)>(block, a, rebuild, stage, wanted, u * kTiles, head, slot);
      }
    });
  }

 private:
  MC_HD static T* target(const Arguments& a, int n, int head) {
    const StreamShape& shape = a.reader.shape;
    return a.out + (static_cast<std::int64_t>(n) * shape.heads + head) * kBlockSize * shape.dim;
  }

  // Blocks number `first` and following, as far as they are `wanted`.
  template <class Formats, class Block>
  MC_HD static void restore(Block& block, const Arguments& a, const RowRebuild& rebuild, const char* stage,
                            const bool (&wanted)[kTiles], int first, int head, int slot) {
    using Stage = KeyStage<Kind, Formats>;
    const StreamShape& shape = a.reader.shape;
    auto* const places = reinterpret_cast<std::int32_t*>(block.shared + a.shared.places);
    const bool retains = Kind == kGeneral && shape.retained > 0;
    if (retains) find_retained(block, StreamBlock{shape, a.reader.pools, a.blocks[first]}, slot, places);
    typename Block::template PerThread<Row> rows[kTiles];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int m = 0; m < kTiles; ++m) rows[m](thread) = Row::of(thread, a, first + m, head);
    });
    auto add = [&](auto half, int n, RebuiltStep<Block, kTiles>& sum) {
      block.each([&](Thread thread) {
        const int own = half_of(a, half);
        if (16 * n + 4 * (thread.lane() % 4) >= own) return;  // half a vector is a multiple of four components
        MC_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          if (!wanted[m]) continue;
          MC_UNROLL
          for (int j = 0; j < 2; ++j) {
            if (retains && places[own_row(thread) + 8 * j] >= 0) continue;
            write<Block>(thread, rows[m](thread), half, own, n, j, sum[m]);
          }
        }
      });
    };
    if constexpr (kTiles == 1) {
      const Stage stages[1] = {{a.reader, stage}};
      rebuild.template each_step<T>(block, stages, add);
    } else {  // the block that is wanted stands in for one that is not
      const int next = a.shared.block_bytes;
      const Stage stages[kTiles] = {{a.reader, stage + (wanted[0] ? 0 : next)},
                                    {a.reader, stage + (wanted[1] ? next : 0)}};
      rebuild.template each_step<T>(block, stages, add);
    }
    if (retains) write_retained(block, a, first, head, slot);
  }

  // The thread's first row of a block, lane / 4 of the warp's tile: where its components 4 t and following go, and what
  // they are turned by.
  struct Row {
    T* out;
    const StepTurns<E>* turns;  // null: they stay as they are

    MC_HD static Row of(Thread thread, const Arguments& a, int n, int head) {
      const int dim = a.reader.shape.dim, row = own_row(thread), t = thread.lane() % 4;
      T* const out = target(a, n, head) + row * dim + 4 * t;
      if (a.turns == nullptr) return {out, nullptr};
      const auto* const table = a.turns + (static_cast<std::int64_t>(n) * kBlockSize + row) * BlockTurns<T>::pairs(dim);
      return {out, reinterpret_cast<const StepTurns<E>*>(table) + t};
    }
  };

  // Half of a vector, as a constant where it is one.
  MC_HD static int half_of(const Arguments& a, int) { return a.reader.shape.dim / 2; }
  template <int Half>
  MC_HD static constexpr int half_of(const Arguments&, Fixed<Half>) {
    return Half;
  }

  // The thread's four components of half a vector in step n, and those they are paired with; j: of which row. `padded`:
  // half of a padded vector.
  template <class Block>
  MC_HD static void write(Thread thread, const Row& row, int padded, int half, int n, int j,
                          const typename Block::template PerThread<FragmentD> (&sum)[4]) {
    Neighbours<Pair<T>, 2> low, high;
    StepTurns<E> by{};
    if (row.turns != nullptr) by = row.turns[8 * j * (padded / 4) + 4 * n];
    MC_UNROLL
    for (int k = 0; k < 2; ++k) {
      const float* const x = sum[k](thread).x + 2 * j;
      const float* const y = sum[k + 2](thread).x + 2 * j;
      if (row.turns != nullptr) {
        Pair<E> first = round_pair<E>(x[0], x[1]), second = round_pair<E>(y[0], y[1]);
        by.x[k].apply(first, second);
        low.x[k] = rounded(first);
        high.x[k] = rounded(second);
      } else {
        low.x[k] = round_pair<T>(x[0], x[1]);
        high.x[k] = round_pair<T>(y[0], y[1]);
      }
    }
    T* const out = row.out + 8 * j * 2 * half + 16 * n;
    store_as(out, low);
    store_as(out + half, high);
  }
  MC_HD static Pair<T> rounded(Pair<E> x) {
    if constexpr (std::is_same_v<T, E>) {
      return x;
    } else {
      return round_pair<T>(first_of(x), second_of(x));
    }
  }

  // Vectors that block number n keeps exactly.
  template <class Block>
  MC_HD static void write_retained(Block& block, const Arguments& a, int n, int head, int slot) {
    const StreamShape& shape = a.reader.shape;
    const StreamBlock from{shape, a.reader.pools, a.blocks[n]};
    const int chunks = shape.dim / kChunk;
    block.each([&](Thread thread) {
      for (int i = thread.index; i < shape.retained * chunks; i += kThreads) {
        const int place = i / chunks, component = i % chunks * kChunk, row = from.retained_index(slot)[place];
        if (row < 0 || row >= kBlockSize) continue;
        float x[kChunk];
        load_exact_chunk<T>(x, from, slot, place, component);
        store_chunk(target(a, n, head) + row * shape.dim + component, x);
      }
    });
  }
};

}  // namespace minicache
