// Which queries a thread block attends, which keys they see, and where those keys are.
#pragma once

#include "minicache/block.cuh"
#include "minicache/layout.cuh"

namespace minicache {

constexpr int kEndOfContext = 0x7fffffff;

// The compressed tier of one layer, restored: K and V [prefills, columns, H, B, D] of blocks
// [first, first + columns) of each prefill chunk's sequence.
template <class T>
struct RestoredHistory {
  const T* keys;
  const T* values;
  std::int32_t first, columns;
};

// Rows of a tile are pairs (query, query head) of one KV head, query-major, so that each key is loaded once for all
// query heads that share it: row r of a chunk is query r / G, query head r % G of the group.
struct QueryTile {
  std::int32_t sequence, head, group;  // KV head; G query heads share it
  std::int32_t first;                  // row of the chunk that is row 0 of the tile
  std::int32_t queries;                // of the chunk
  std::int32_t start;                  // position of the chunk's first query
  std::int32_t compressed;             // blocks of the sequence in the compressed tier
  std::int64_t token;                  // packed row of the chunk's first query

  MC_HD static QueryTile of(const Step& step, const AttentionShape& shape, int sequence, int head, int first) {
    const int queries = step.query_start[sequence + 1] - step.query_start[sequence];
    return QueryTile{sequence,
                     head,
                     shape.query_heads / shape.heads,
                     first,
                     queries,
                     step.context_len[sequence] - queries,
                     step.compressed(sequence) / kBlockSize,
                     step.query_start[sequence]};
  }

  MC_HD int rows() const { return queries * group - first; }  // from row 0 of the tile to the chunk's end
  MC_HD int context() const { return start + queries; }
  MC_HD int position(int row) const { return start + (first + row) / group; }
  MC_HD int query_head(int row) const { return head * group + (first + row) % group; }
  MC_HD std::int64_t token_of(int row) const { return token + (first + row) / group; }
};

// Blocks of 64 positions, numbered from the start of the sequence, that a tile attends to in one launch. Launches take
// the history in order: each but the last takes its piece of the compressed tier, the last one its piece and the full
// tier.
struct BlockRange {
  std::int32_t begin, end;
  bool resumes;  // an earlier launch attended to blocks before `begin`

  // Positions (p - window, p] are visible from p; window 0: all up to p.
  MC_HD static BlockRange of(const QueryTile& tile, int tile_rows, int window, int first, int columns, bool last) {
    const int lowest_query = tile.position(0);
    const int highest_query = tile.position(minimum(tile_rows, tile.rows()) - 1);
    const int visible = window > 0 ? maximum(0, lowest_query - window + 1) / kBlockSize : 0;
    const int taken = minimum(first, tile.compressed);
    const int stop = last ? kEndOfContext : minimum(first + columns, tile.compressed);
    return BlockRange{maximum(visible, taken), minimum(highest_query / kBlockSize + 1, stop), visible < taken};
  }
};

// Where the tile's keys and values of each block of the sequence are. Rows of tables and blocks of one head are counted
// in 32 bits, numbers in 64.
template <class T, int D>
struct KeyBlocks {
  const QueryTile& tile;
  const Step& step;
  const FullTier<T>& full;
  const RestoredHistory<T>& history;

  // [B, D] of the tile's KV head.
  MC_HD const T* at(Part part, int index) const {
    const T* base = full.kv;
    int block;
    if (index < tile.compressed) {
      base = part == Part::key ? history.keys : history.values;
      block = (tile.sequence - step.decodes) * history.columns + index - history.first;
    } else {
      block = step.full_table[tile.sequence * step.full_columns + index - tile.compressed] * 2 + static_cast<int>(part);
    }
    return base + static_cast<std::int64_t>(block * full.heads + tile.head) * (kBlockSize * D);
  }
};

// Which blocks of the compressed tier a launch reads: `blocks` and `block_index` [prefills, columns] for the restoring
// kernel. Blocks that no query of the chunk sees are -1.
struct HistoryBlocks {
  static constexpr int kThreads = 128;

  struct Arguments {
    Step step;
    std::int32_t first, columns, sliding_window;
    std::int32_t* blocks;
    std::int32_t* block_index;
  };

  template <class Block>
  MC_HD static void run(Block& block, const Arguments& arguments) {
    const Step& step = arguments.step;
    block.each([&](Thread thread) {
      const int column = block.x() * kThreads + thread.index, sequence = step.decodes + block.y();
      if (column >= arguments.columns) return;
      const int index = arguments.first + column;
      const int start =
          step.context_len[sequence] - (step.query_start[sequence + 1] - step.query_start[sequence]);
      const int window = arguments.sliding_window;
      const int visible = window > 0 ? maximum(0, start - window + 1) / kBlockSize : 0;
      const bool seen = index >= visible && index < step.compressed(sequence) / kBlockSize;
      const std::int64_t table = static_cast<std::int64_t>(sequence) * step.compressed_columns + index;
      const std::int64_t place = static_cast<std::int64_t>(block.y()) * arguments.columns + column;
      arguments.blocks[place] = seen ? step.compressed_table[table] : -1;
      arguments.block_index[place] = index;
    });
  }
};

}  // namespace minicache
