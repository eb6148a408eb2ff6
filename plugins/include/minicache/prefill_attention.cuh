// Causal attention of prefill chunks over both tiers: queries of one KV head's group in tiles, keys in cache blocks.
//
//   Q tile -- shared memory, once
//   per cache block, from the oldest:  K -> logits -> mask -> softmax weights -> V -> accumulators
//
// A block's values arrive while its logits are computed, the next block's keys during its softmax and second product.
// What a row gets depends on the row and its keys alone: not on the size of tiles, on how the history is cut into
// launches, nor on other sequences, so results are the same bits.
#pragma once

#include "minicache/query_tile.cuh"
#include "minicache/softmax.cuh"
#include "minicache/tile.cuh"
#include "minicache/tile_products.cuh"

namespace minicache {

// State of all rows (token, query head) between two launches, in float, so that resuming loses nothing.
struct PrefillCarry {
  float* accumulators;  // [tokens, Hq, D]
  float* maxima;        // [tokens, Hq]
  float* sums;          // [tokens, Hq, 4]: parts of the four lanes that share a row
};

struct alignas(8) CarryPair {
  float x[2];
};

template <class T>
struct PrefillArguments {
  AttentionShape shape;
  Step step;
  FullTier<T> full;
  RestoredHistory<T> history;
  PrefillCarry carry;  // unused where there is one launch only
  const T* q;
  T* out;
  std::int64_t q_stride, out_stride;
  SoftCap cap;  // of logits that are not scaled yet
  std::int32_t sliding_window;
  std::int32_t tiles;  // of the longest chunk
  bool last;           // of the launches: takes the full tier and writes `out`
};

// Head dimension D; Rows: how many times 16 rows a warp attends. Grid: KV heads, prefill chunks, tiles.
template <class T, int D, int Rows>
struct PrefillAttention {
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = Rows == 1 && D <= 128 ? 3 : 2;
  static constexpr int kTileRows = kThreads / kWarp * 16 * Rows;
  static constexpr int kSharedBytes = SharedRows<T, D>::bytes(kTileRows + 2 * kBlockSize);

  using Arguments = PrefillArguments<T>;
  template <class Block>
  using Softmax = OnlineSoftmax<Block, Rows, SharedRows<T, D>::bytes(1)>;  // sums lie behind the rows of queries
  template <class Block>
  using Logits = typename Block::template PerThread<FragmentD>[Rows][kBlockSize / 8];
  template <class Block>
  using Accumulators = typename Block::template PerThread<FragmentD>[Rows][D / 8];

  template <class Block>
  MC_HD static void run(Block& block, const Arguments& arguments) {
    const QueryTile tile = tile_of(block, arguments);
    if (tile.rows() <= 0) return;
    const BlockRange range = BlockRange::of(tile, kTileRows, arguments.sliding_window, arguments.history.first,
                                            arguments.history.columns, arguments.last);
    if (range.begin >= range.end && !arguments.last) return;

    Softmax<Block> softmax;
    softmax.sums.base = reinterpret_cast<char*>(queries_of(block).at(0, D));
    Accumulators<Block> accumulators;
    if (range.resumes) {
      load_carry(block, arguments, tile, softmax, accumulators);
    } else {
      softmax.reset(block);
      block.each([&](Thread thread) {
        MC_UNROLL
        for (int i = 0; i < Rows * D / 8; ++i) {
          accumulators[i / (D / 8)][i % (D / 8)](thread) = FragmentD{{0.0f, 0.0f, 0.0f, 0.0f}};
        }
      });
    }
    attend(block, arguments, tile, range, softmax, accumulators);
    // Read again, here and for masks: during the loop every register counts.
    const QueryTile same = tile_of(block, arguments);
    if (arguments.last) {
      write(block, arguments, same, softmax, accumulators);
    } else {
      save_carry(block, arguments, same, softmax, accumulators);
    }
  }

 private:
  template <class Block>
  MC_HD static SharedRows<T, D> queries_of(const Block& block) {
    return SharedRows<T, D>{reinterpret_cast<T*>(block.shared)};
  }

  // Tiles with most keys start first.
  template <class Block>
  MC_HD static QueryTile tile_of(const Block& block, const Arguments& arguments) {
    const Step& step = arguments.step;
    const int first = (arguments.tiles - 1 - block.z()) * kTileRows;
    return QueryTile::of(step, arguments.shape, step.decodes + block.y(), block.x(), first);
  }

  template <class Block>
  MC_HD static void attend(Block& block, const Arguments& arguments, const QueryTile& tile, const BlockRange& range,
                           Softmax<Block>& softmax, Accumulators<Block>& accumulators) {
    if (range.begin >= range.end) return;
    const SharedRows<T, D> queries = queries_of(block);
    const SharedRows<T, D> keys{queries.at(kTileRows, 0)}, values{keys.at(kBlockSize, 0)};
    const float scale = arguments.shape.scale * kLog2e;
    const int context = tile.context();
    const int whole = (tile.position(0) + 1) / kBlockSize;  // blocks that all queries see to their end
    const KeyBlocks<T, D> blocks{tile, arguments.step, arguments.full, arguments.history};
    queries.template load<kTileRows>(block, tile.rows(), [&](int row) {
      return arguments.q + tile.token_of(row) * arguments.q_stride + tile.query_head(row) * D;
    });
    keys.template load_block<kBlockSize>(block, blocks.at(Part::key, range.begin),
                                         context - range.begin * kBlockSize);
    Block::commit_async();
    for (int index = range.begin; index < range.end; ++index) {
      Block::template wait_async<0>();
      block.sync();  // keys are there, and nobody reads the previous values any more
      values.template load_block<kBlockSize>(block, blocks.at(Part::value, index),
                                             context - index * kBlockSize);
      Block::commit_async();
      Logits<Block> logits;
      multiply_keys<D, Rows>(block, queries, keys, logits);
      Block::template wait_async<0>();
      block.sync();  // values are there, and nobody reads the keys any more
      if (index + 1 < range.end) {
        keys.template load_block<kBlockSize>(block, blocks.at(Part::key, index + 1),
                                             context - (index + 1) * kBlockSize);
        Block::commit_async();
      }
      if (arguments.cap.cap > 0.0f) cap(block, arguments.cap, logits);
      if (index >= whole || arguments.sliding_window > 0) mask(block, arguments, index, logits);
      softmax.update(block, scale, logits, accumulators);
      multiply_values<D, Rows>(block, logits, values, accumulators);
    }
  }

  // Logits are not scaled yet, and neither is what they become.
  template <class Block>
  MC_HD static void cap(Block& block, const SoftCap& cap, Logits<Block>& logits) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < Rows * kBlockSize / 8; ++n) {
        FragmentD& logit = logits[n / (kBlockSize / 8)][n % (kBlockSize / 8)](thread);
        MC_UNROLL
        for (int i = 0; i < 4; ++i) logit.x[i] = cap(logit.x[i]);
      }
    });
  }

  // Logits of keys a query does not see become -infinity. Key x (counted from the chunk's first query) is behind query
  // row / G if and only if x G > row.
  template <class Block>
  MC_HD static void mask(Block& block, const Arguments& arguments, int index, Logits<Block>& logits) {
    const QueryTile tile = tile_of(block, arguments);
    const int group = tile.group, begin = (index * kBlockSize - tile.start) * group;
    const int window = arguments.sliding_window > 0 ? arguments.sliding_window * group : kEndOfContext;
    const bool whole = begin + (kBlockSize - 1) * group <= tile.first && begin > tile.first + kTileRows - 1 - window;
    if (whole) return;
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int n = 0; n < kBlockSize / 4; ++n) {
        const int key = begin + (8 * (n / 2) + 2 * (thread.lane() % 4) + n % 2) * group;
        MC_UNROLL
        for (int i = 0; i < 2 * Rows; ++i) {
          const int row = tile.first + fragment_row<Rows>(thread, i / 2, i % 2);
          if (key > row || key <= row - window) logits[i / 2][n / 2](thread).x[2 * (i % 2) + n % 2] = -kInfinity;
        }
      }
    });
  }

  template <class Block>
  MC_HD static void write(Block& block, const Arguments& arguments, const QueryTile& tile,
                          Softmax<Block>& softmax, Accumulators<Block>& accumulators) {
    typename Block::template PerThread<float> sums[Rows][2];
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) sums[i / 2][i % 2](thread) = softmax.sums.at(thread, i / 2, i % 2);
    });
    MC_UNROLL
    for (int i = 0; i < 2 * Rows; ++i) block.template reduce_add<4>(sums[i / 2][i % 2]);
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        const int m = i / 2, j = i % 2, row = fragment_row<Rows>(thread, m, j);
        if (row >= tile.rows()) continue;
        const float sum = sums[m][j](thread), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        T* out = arguments.out + tile.token_of(row) * arguments.out_stride + tile.query_head(row) * D;
        out += 2 * (thread.lane() % 4);
        MC_UNROLL
        for (int n = 0; n < D / 8; ++n) {
          const float* x = accumulators[m][n](thread).x + 2 * j;
          store_as(out + 8 * n, round_pair<T>(x[0] * inverse, x[1] * inverse));
        }
      }
    });
  }

  template <class Block>
  MC_HD static void save_carry(Block& block, const Arguments& arguments, const QueryTile& tile,
                               const Softmax<Block>& softmax, const Accumulators<Block>& accumulators) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        const int m = i / 2, j = i % 2, row = fragment_row<Rows>(thread, m, j), lane = thread.lane() % 4;
        if (row >= tile.rows()) continue;
        const std::int64_t place = carry_row(arguments, tile, row);
        if (lane == 0) arguments.carry.maxima[place] = softmax.maximum[m][j](thread);
        arguments.carry.sums[4 * place + lane] = softmax.sums.at(thread, m, j);
        float* numbers = arguments.carry.accumulators + place * D + 2 * lane;
        MC_UNROLL
        for (int n = 0; n < D / 8; ++n) {
          const float* x = accumulators[m][n](thread).x + 2 * j;
          store_as(numbers + 8 * n, CarryPair{{x[0], x[1]}});
        }
      }
    });
  }

  // Rows past the chunk's end start over, like those of a first launch.
  template <class Block>
  MC_HD static void load_carry(Block& block, const Arguments& arguments, const QueryTile& tile,
                               Softmax<Block>& softmax, Accumulators<Block>& accumulators) {
    block.each([&](Thread thread) {
      MC_UNROLL
      for (int i = 0; i < 2 * Rows; ++i) {
        const int m = i / 2, j = i % 2, row = fragment_row<Rows>(thread, m, j), lane = thread.lane() % 4;
        const bool real = row < tile.rows();
        const std::int64_t place = real ? carry_row(arguments, tile, row) : 0;
        softmax.maximum[m][j](thread) = real ? arguments.carry.maxima[place] : -kInfinity;
        softmax.sums.at(thread, m, j) = real ? arguments.carry.sums[4 * place + lane] : 0.0f;
        const float* numbers = arguments.carry.accumulators + place * D + 2 * lane;
        MC_UNROLL
        for (int n = 0; n < D / 8; ++n) {
          float* x = accumulators[m][n](thread).x + 2 * j;
          const CarryPair pair = real ? load_as<CarryPair>(numbers + 8 * n) : CarryPair{};
          x[0] = pair.x[0];
          x[1] = pair.x[1];
        }
      }
    });
  }

  MC_HD static std::int64_t carry_row(const Arguments& arguments, const QueryTile& tile, int row) {
    return tile.token_of(row) * arguments.shape.query_heads + tile.query_head(row);
  }
};

}  // namespace minicache
