// Work of decode attention: a work item is one split of one tier for one decode and up to eight query heads of a KV
// head. Splits are fixed ranges of 512 tokens of a tier, so what a split computes depends on its sequence alone.
//
// A split works in passes over its cache blocks: logits of all its keys into shared memory, one softmax, weighted sums
// of its values. Logits carry a factor log2(e): weights are exp2(logit - maximum).
#pragma once

#include "minicache/elementary.cuh"
#include "minicache/fragments.cuh"
#include "minicache/layout.cuh"

namespace minicache {

constexpr int kSplitTokens = 512;
constexpr int kSplitBlocks = kSplitTokens / kBlockSize;
constexpr int kQueryTile = 8;  // query heads of a work item: the columns of a matrix product
constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarp;

// What all kernels of decode attention are told. Rows of queries are numbered s * query_heads + head, s < decodes.
template <class T>
struct DecodeProblem {
  AttentionShape shape;
  Step step;
  std::int32_t sliding_window;
  std::int32_t group, tiles;  // query heads per KV head, and tiles of kQueryTile for them
  std::int32_t full_splits, compressed_splits;  // per decode, as many as the tables have room for
  const T* q;
  std::int64_t q_stride;

  MC_HD const T* query(int sequence, int head) const {
    return q + step.query_start[sequence] * q_stride + static_cast<std::int64_t>(head) * shape.dim;
  }
  MC_HD std::int64_t query_row(int sequence, int head) const {
    return static_cast<std::int64_t>(sequence) * shape.query_heads + head;
  }
};

// Tokens of a tier, counted from its start.
struct TokenRange {
  int first, last;
  MC_HD bool empty() const { return last <= first; }
};

// What a decode sees of the tier; never more than its table has room for.
template <class T>
MC_HD TokenRange visible(const DecodeProblem<T>& problem, bool compressed_tier, int sequence) {
  const Step& step = problem.step;
  const int length = step.context_len[sequence], compressed = step.compressed(sequence);
  const int behind = problem.sliding_window > 0 ? length - problem.sliding_window : 0;
  if (compressed_tier) return {maximum(behind, 0), minimum(compressed, step.compressed_columns * kBlockSize)};
  return {maximum(behind - compressed, 0), minimum(length - compressed, step.full_columns * kBlockSize)};
}

// One work item. Tokens and cache blocks of the split, those seen only, counted from the start of the split.
struct SplitItem {
  int sequence, head, split;
  int query, queries;  // first query head, and how many of the tile are real
  TokenRange tokens;
  int first_block, last_block;

  MC_HD int block(int i) const { return split * kSplitBlocks + i; }  // column of the table

  template <class Block, class T>
  MC_HD static SplitItem of(const Block& block, const DecodeProblem<T>& problem, bool compressed_tier) {
    SplitItem item;
    item.sequence = block.z();
    item.split = block.x();
    item.head = block.y() / problem.tiles;
    const int first = block.y() % problem.tiles * kQueryTile;
    item.query = item.head * problem.group + first;
    item.queries = minimum(problem.group - first, kQueryTile);
    const TokenRange all = visible(problem, compressed_tier, item.sequence);
    const int start = item.split * kSplitTokens;
    item.tokens = {maximum(all.first - start, 0), minimum(all.last - start, kSplitTokens)};
    item.first_block = item.tokens.first / kBlockSize;
    item.last_block = ceil_div(item.tokens.last, kBlockSize);
    return item;
  }
};

// Partial results, float32, one record per query row and split: maximum of the logits, sum of the weights, sum of those
// that go with the values' offset (compressed tier), one unused; then vectors.
struct Partials {
  float* records;
  std::int32_t splits, record;
  MC_HD float* at(std::int64_t query_row, int split) const { return records + (query_row * splits + split) * record; }
};
constexpr int kRecordHead = 4;

// Logits, then weights, of a split in shared memory: [kQueryTile][kStride].
struct Scores {
  // 8 banks further per query: a warp that reads neighbouring tokens of eight queries meets no conflict.
  static constexpr int kStride = kSplitTokens + 8;
  static constexpr int kBytes = kQueryTile * kStride * 4;
  float* x;
  MC_HD float& operator()(int query, int token) const { return x[query * kStride + token]; }
  // Of tokens first, first + 1, first + 8, first + 9: a thread's part of 16 tokens. `first` is even.
  MC_HD void load(int query, int first, float (&out)[4]) const {
    MC_UNROLL
    for (int j = 0; j < 2; ++j) {
      const auto two = *reinterpret_cast<const Neighbours<float, 2>*>(&(*this)(query, first + 8 * j));
      out[2 * j] = two.x[0];
      out[2 * j + 1] = two.x[1];
    }
  }
};

MC_HD float sum_of(const float (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// A lane's part of a query's logits: runs of four neighbouring tokens, kWarp runs of a row at a time.
struct LogitRuns {
  static constexpr int kRun = 4, kTokens = kRun * kWarp, kRuns = kSplitTokens / kTokens;
  using Run = Neighbours<float, kRun>;
  Run runs[kRuns];

  MC_HD static int first(Thread thread, int n) { return n * kTokens + kRun * thread.lane(); }
  MC_HD static Run& at(Scores scores, int query, Thread thread, int n) {
    return *reinterpret_cast<Run*>(&scores(query, first(thread, n)));
  }
};

// Turns the item's logits, soft-capped if the model's are, into weights; writes maximum and sum of its queries. Tokens
// not seen get weight 0. Columns of the tile without a query keep what they have: matrix products do not mix columns.
// Begins and ends with a `sync`.
template <class Block, class T>
MC_HD void softmax(Block& block, const DecodeProblem<T>& problem, const SplitItem& item, const Partials& partials,
                   Scores scores) {
  constexpr int kTokens = LogitRuns::kTokens;
  const TokenRange seen = item.tokens;
  const SoftCap cap(problem.shape.softcap * kLog2e);
  // Of kTokens tokens: whether any is seen, whether all are. There are logits of whole cache blocks.
  auto counts = [&](int n) { return n * kTokens < seen.last && (n + 1) * kTokens > seen.first; };
  auto whole = [&](int n) { return n * kTokens >= seen.first && (n + 1) * kTokens <= seen.last; };
  auto has = [&](int token) { return token >= item.first_block * kBlockSize && token < item.last_block * kBlockSize; };
  block.sync();
  for (int m = 0; m * kDecodeWarps < item.queries; ++m) {
    auto query_of = [&](Thread thread) { return thread.warp() + m * kDecodeWarps; };
    if (!block.any_warp([&](Thread thread) { return query_of(thread) < item.queries; })) break;
    typename Block::template PerThread<LogitRuns> logits;
    typename Block::template PerThread<float> peak, sum;
    block.each([&](Thread thread) {
      float highest = -kInfinity;
      MC_UNROLL
      for (int n = 0; n < LogitRuns::kRuns; ++n) {
        if (!counts(n)) continue;
        LogitRuns::Run& run = logits(thread).runs[n];
        const int first = LogitRuns::first(thread, n);
        if (whole(n) || has(first)) {
          run = LogitRuns::at(scores, query_of(thread), thread, n);
          if (problem.shape.softcap > 0.0f) {
            MC_UNROLL
            for (float& x : run.x) x = cap(x);
          }
        }
        if (!whole(n)) {
          MC_UNROLL
          for (int i = 0; i < LogitRuns::kRun; ++i) {
            if (first + i < seen.first || first + i >= seen.last) run.x[i] = -kInfinity;
          }
        }
        MC_UNROLL
        for (const float x : run.x) highest = maximum(highest, x);
      }
      peak(thread) = highest;
    });
    block.template reduce_max<kWarp>(peak);
    block.each([&](Thread thread) {
      const float shift = peak(thread) == -kInfinity ? 0.0f : peak(thread);
      float total = 0.0f;
      MC_UNROLL
      for (int n = 0; n < LogitRuns::kRuns; ++n) {
        if (!counts(n)) continue;
        LogitRuns::Run& run = logits(thread).runs[n];
        MC_UNROLL
        for (float& x : run.x) total += x = exp2_approximate(x - shift);
        if (whole(n) || has(LogitRuns::first(thread, n))) LogitRuns::at(scores, query_of(thread), thread, n) = run;
      }
      sum(thread) = total;
    });
    block.template reduce_add<kWarp>(sum);
    block.each([&](Thread thread) {
      const int query = query_of(thread);
      if (thread.lane() != 0 || query >= item.queries) return;
      float* record = partials.at(problem.query_row(item.sequence, item.query + query), item.split);
      record[0] = peak(thread);
      record[1] = record[2] = sum(thread);
    });
  }
  block.sync();
}

// Weights of tokens first, first + 1, first + 8, first + 9: a thread's part of fragment B of 16 tokens.
template <class E>
MC_HD FragmentB<E> weight_fragment(Scores scores, int query, int first) {
  FragmentB<E> result;
  float x[4];
  scores.load(query, first, x);
  MC_UNROLL
  for (int j = 0; j < 2; ++j) put_pair(result, j, round_pair<E>(x[2 * j], x[2 * j + 1]));
  return result;
}

// log2 of the threads that copy a row of `bytes` bytes.
MC_HD constexpr int row_shift(int bytes) {
  int shift = 0;
  while (16 << shift < bytes) ++shift;
  return shift;
}

// Copies `rows` rows of `bytes` bytes (a multiple of 16, at most 2048) that lie one after another to rows `stride` bytes
// apart; rows from `valid` on are filled with zeros. `shift`: `row_shift(bytes)`.
template <class Block>
MC_HD void copy_rows(Thread thread, char* target, int stride, const void* source, int bytes, int shift, int rows,
                     int valid) {
  const int first = thread.index >> shift, column = (thread.index & ((1 << shift) - 1)) * 16;
  if (column >= bytes) return;
  const int step = kDecodeThreads >> shift;
  const char* from = static_cast<const char*>(source) + first * bytes + column;
  char* to = target + first * stride + column;
  for (int row = first; row < rows; row += step) {
    Block::copy_async(to, row < valid ? from : static_cast<const char*>(source), row < valid);
    from += step * bytes;
    to += step * stride;
  }
}

// Starts copying `bytes` bytes, whole units of 16, to shared memory.
template <class Block>
MC_HD void fetch_bytes(Block& block, char* target, const void* source, int bytes) {
  block.each([&](Thread thread) {
    for (int at = thread.index * 16; at < bytes; at += kDecodeThreads * 16) {
      Block::copy_async(target + at, static_cast<const char*>(source) + at);
    }
  });
}

// Waits until the oldest of `stages - 1` groups of copies has arrived.
template <class Block>
MC_HD void wait_stage(Block& block, int stages) {
  if (stages >= 4) {
    Block::template wait_async<2>();
  } else if (stages == 3) {
    Block::template wait_async<1>();
  } else {
    Block::template wait_async<0>();
  }
  block.sync();
}

}  // namespace minicache
