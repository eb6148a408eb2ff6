// How the workspace of prefill attention is divided.
#pragma once

#include "api.h"

namespace minicache {

constexpr std::int64_t kHistoryBytes = std::int64_t{64} << 20;  // of restored keys and values, by default
constexpr std::int32_t kSmallestPiece = 8;                      // blocks of a sequence, by default

inline int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

inline bool has_history(const AttentionArguments& a) {
  return a.key.shape != nullptr && a.step.compressed_columns > 0 && a.step.sequences > a.step.decodes;
}

// Byte offsets of the parts. The history is restored in pieces of `columns` blocks of every chunk's sequence; with more
// than one piece, the state of all rows lies beside it. Sizes follow from shapes, and results do not depend on them.
struct PrefillWorkspace {
  std::int32_t columns = 0, pieces = 0;  // 0 without a compressed tier
  std::int64_t blocks = 0, block_index = 0;
  std::int64_t keys = 0, values = 0;
  std::int64_t restoring = 0, restoring_bytes = 0;  // what restoring the keys, then the values, works in
  std::int64_t accumulators = 0, maxima = 0, sums = 0;
  std::int64_t bytes = 0;

  static PrefillWorkspace of(const AttentionArguments& a, std::int32_t columns) {
    PrefillWorkspace result;
    if (!has_history(a)) return result;
    const std::int64_t chunks = a.step.sequences - a.step.decodes;
    const std::int64_t rows = static_cast<std::int64_t>(a.step.tokens) * a.shape.query_heads;
    result.columns = columns;
    result.pieces = (a.step.compressed_columns + columns - 1) / columns;
    result.blocks = result.take(chunks * columns * 4);
    result.block_index = result.take(chunks * columns * 4);
    result.keys = result.take(chunks * columns * block_bytes(a));
    result.values = result.take(chunks * columns * block_bytes(a));
    for (const StreamView* view : {&a.key, &a.value}) {
      const auto count = static_cast<std::int32_t>(chunks * columns);
      result.restoring_bytes = maximum(result.restoring_bytes, minicache_restore_workspace(a.type, view->shape, count));
    }
    result.restoring = result.take(result.restoring_bytes);
    if (result.pieces == 1) return result;
    result.accumulators = result.take(rows * a.shape.dim * 4);
    result.maxima = result.take(rows * 4);
    result.sums = result.take(rows * 4 * 4);
    return result;
  }

  // The whole history at once where it is small enough. A step with more of anything never takes less, so what the
  // largest step takes is enough for every step.
  static std::int64_t recommended_bytes(const AttentionArguments& a) {
    if (!has_history(a)) return 0;
    const PrefillWorkspace whole = of(a, a.step.compressed_columns);
    const PrefillWorkspace least = of(a, minimum(kSmallestPiece, a.step.compressed_columns));
    const std::int64_t state = least.pieces > 1 ? least.bytes - least.accumulators : 0;
    return minimum(whole.bytes, maximum(least.bytes, state + kHistoryBytes));
  }

  // The largest pieces that fit into `available` bytes; pieces of one block where not even they do.
  static PrefillWorkspace within(const AttentionArguments& a, std::int64_t available) {
    if (!has_history(a)) return PrefillWorkspace{};
    const PrefillWorkspace whole = of(a, a.step.compressed_columns);
    if (whole.bytes <= available) return whole;
    std::int32_t fits = 1, too_many = a.step.compressed_columns;
    while (too_many - fits > 1) {
      const std::int32_t columns = fits + (too_many - fits) / 2;
      (of(a, columns).bytes <= available ? fits : too_many) = columns;
    }
    return of(a, fits);
  }

 private:
  static std::int64_t block_bytes(const AttentionArguments& a) {
    return static_cast<std::int64_t>(a.shape.heads) * kBlockSize * a.shape.dim * bytes_of(a.type);
  }

  std::int64_t take(std::int64_t size) {
    const std::int64_t offset = bytes;
    bytes += (size + 255) / 256 * 256;
    return offset;
  }
};

}  // namespace minicache
