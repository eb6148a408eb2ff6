// Decode attention over a split of the full tier: keys and values as the model made them.
#pragma once

#include "minicache/decode_split.cuh"

namespace minicache {

template <class T>
struct FullSplitArguments {
  DecodeProblem<T> problem;
  FullTier<T> tier;
  Partials partials;  // one vector, D numbers
};

// Thread block: (split, KV head and tile of its query heads, decode).
template <class T, int D>
struct FullSplit {
  static constexpr int kThreads = kDecodeThreads;
  static constexpr int kStages = D <= 128 ? 3 : 2;
  // An odd number of 16-byte units: eight rows of a matrix lie in different banks.
  static constexpr int kRow = D * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kStage = kBlockSize * kRow;
  static constexpr int kShared = kStages * kStage + Scores::kBytes;
  static constexpr int kSteps = D / 16;                               // of 16 components
  static constexpr int kOwn = (kSteps + kDecodeWarps - 1) / kDecodeWarps;  // of them per warp, for values

  template <class Block>
  MC_HD static void run(Block& block, const FullSplitArguments<T>& a) {
    const SplitItem item = SplitItem::of(block, a.problem, false);
    if (item.tokens.empty()) return;
    const Scores scores{reinterpret_cast<float*>(block.shared + kStages * kStage)};
    const int blocks = item.last_block - item.first_block;
    // Tile u < blocks holds keys, later ones values; stage u % kStages.
    auto fetch = [&](int u) {
      if (u < 2 * blocks) fetch_tile(block, a, item, u % blocks + item.first_block, u < blocks, u % kStages);
      Block::commit_async();
    };
    for (int u = 0; u < kStages - 1; ++u) fetch(u);
    typename Block::template PerThread<FragmentB<T>> query[kSteps];
    load_query(block, a.problem, item, query);
    for (int u = 0; u < blocks; ++u) {
      wait_stage(block, kStages);
      fetch(u + kStages - 1);
      logits(block, a.problem, query, u % kStages, (item.first_block + u) * kBlockSize, scores);
    }
    softmax(block, a.problem, item, a.partials, scores);
    typename Block::template PerThread<FragmentD> sums[kOwn];
    block.each([&](Thread thread) {
      for (int n = 0; n < kOwn; ++n) sums[n](thread) = FragmentD{};
    });
    for (int u = blocks; u < 2 * blocks; ++u) {
      wait_stage(block, kStages);
      fetch(u + kStages - 1);
      add_values(block, u % kStages, (item.first_block + u - blocks) * kBlockSize, scores, sums);
    }
    store(block, a, item, sums);
  }

 private:
  template <class Block>
  MC_HD static void fetch_tile(Block& block, const FullSplitArguments<T>& a, const SplitItem& item, int i, bool keys,
                               int stage) {
    const Step& step = a.problem.step;
    const std::int64_t column = static_cast<std::int64_t>(item.sequence) * step.full_columns + item.block(i);
    const T* source = a.tier.block(step.full_table[column], keys ? Part::key : Part::value, item.head);
    block.each([&](Thread thread) {
      constexpr int kBytes = D * static_cast<int>(sizeof(T));
      copy_rows<Block>(thread, block.shared + stage * kStage, kRow, source, kBytes, row_shift(kBytes), kBlockSize,
                       item.tokens.last - i * kBlockSize);
    });
  }

  template <class Block>
  MC_HD static void load_query(Block& block, const DecodeProblem<T>& problem, const SplitItem& item,
                               typename Block::template PerThread<FragmentB<T>> (&query)[kSteps]) {
    block.each([&](Thread thread) {
      const int head = thread.lane() / 4, first = 2 * (thread.lane() % 4);
      const T* row = problem.query(item.sequence, item.query + (head < item.queries ? head : 0));
      MC_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const T x = row[16 * k + first + i % 2 + 8 * (i / 2)];
          query[k](thread).x[i] = head < item.queries ? x : from_float<T>(0.0f);
        }
      }
    });
  }

  // Each warp: 16 tokens of the cache block.
  template <class Block>
  MC_HD static void logits(Block& block, const DecodeProblem<T>& problem,
                           const typename Block::template PerThread<FragmentB<T>> (&query)[kSteps], int stage,
                           int token, Scores scores) {
    typename Block::template PerThread<FragmentD> sum;
    block.each([&](Thread thread) { sum(thread) = FragmentD{}; });
    MC_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      typename Block::template PerThread<FragmentA<T>> keys;
      block.template load_matrices<false>(keys, [&](Thread thread) -> const void* {
        const int l = thread.lane(), row = 16 * thread.warp() + l % 8 + 8 * (l / 8 % 2), column = 16 * k + 8 * (l / 16);
        return block.shared + stage * kStage + row * kRow + column * static_cast<int>(sizeof(T));
      });
      block.multiply_add(sum, keys, query[k]);
    }
    const float scale = problem.shape.scale * kLog2e;
    block.each([&](Thread thread) {
      const int g = thread.lane() / 4, t = thread.lane() % 4, row = token + 16 * thread.warp() + g;
      MC_UNROLL
      for (int i = 0; i < 4; ++i) scores(2 * t + i % 2, row + 8 * (i / 2)) = sum(thread).x[i] * scale;
    });
  }

  // Each warp: components 16 (warp + 4 n) to + 15 of all tokens; beyond D it repeats the last ones, for nothing.
  MC_HD static int tile_of(Thread thread, int n) { return minimum(thread.warp() + kDecodeWarps * n, kSteps - 1); }

  template <class Block>
  MC_HD static void add_values(Block& block, int stage, int token, Scores scores,
                               typename Block::template PerThread<FragmentD> (&sums)[kOwn]) {
    MC_UNROLL
    for (int k = 0; k < kBlockSize / 16; ++k) {
      typename Block::template PerThread<FragmentB<T>> weights;
      block.each([&](Thread thread) {
        const int first = token + 16 * k + 2 * (thread.lane() % 4);
        weights(thread) = weight_fragment<T>(scores, thread.lane() / 4, first);
      });
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) {
        typename Block::template PerThread<FragmentA<T>> values;
        block.template load_matrices<true>(values, [&](Thread thread) -> const void* {
          const int l = thread.lane(), row = 16 * k + l % 8 + 8 * (l / 16);
          const int column = 16 * tile_of(thread, n) + 8 * (l / 8 % 2);
          return block.shared + stage * kStage + row * kRow + column * static_cast<int>(sizeof(T));
        });
        block.multiply_add(sums[n], values, weights);
      }
    }
  }

  template <class Block>
  MC_HD static void store(Block& block, const FullSplitArguments<T>& a, const SplitItem& item,
                          const typename Block::template PerThread<FragmentD> (&sums)[kOwn]) {
    block.each([&](Thread thread) {
      const int g = thread.lane() / 4, t = thread.lane() % 4;
      MC_UNROLL
      for (int n = 0; n < kOwn; ++n) {
        const int tile = thread.warp() + kDecodeWarps * n;
        if (tile >= kSteps) break;
        MC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int query = 2 * t + i % 2;
          if (query >= item.queries) continue;
          const std::int64_t row = a.problem.query_row(item.sequence, item.query + query);
          a.partials.at(row, item.split)[kRecordHead + 16 * tile + g + 8 * (i / 2)] = sums[n](thread).x[i];
        }
      }
    });
  }
};

}  // namespace minicache
