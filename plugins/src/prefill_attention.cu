// Attention of prefill chunks: arguments checked, history restored piece by piece, one flash launch per piece.
#include "launching.h"
#include "minicache/prefill_attention.cuh"
#include "prefill_workspace.h"

namespace minicache {
namespace {

constexpr const char* kName = "prefill_attention";

// Tiles of 128 rows reuse keys twice as much as those of 64, but need this many thread blocks to fill a GPU. Either
// gives the same bits.
constexpr std::int64_t kFullGrid = 256;
constexpr std::int32_t kMostBlocks = 65535;  // of a grid along y and z

bool empty(const AttentionArguments& arguments) { return arguments.step.sequences == arguments.step.decodes; }

std::int32_t check_shape(const AttentionArguments& a) {
  const AttentionShape& shape = a.shape;
  if (a.type < Type::float32 || a.type > Type::bfloat16)
    return fail(invalid_argument, "prefill_attention: type: expected 0 to 2, got %d", static_cast<int>(a.type));
  if (shape.heads < 1 || shape.query_heads < 1 || shape.query_heads % shape.heads != 0)
    return fail(invalid_argument, "prefill_attention: query_heads: expected a multiple of %d KV heads, got %d",
                shape.heads, shape.query_heads);
  if (shape.dim != 64 && shape.dim != 80 && shape.dim != 96 && shape.dim != 128 && shape.dim != 256)
    return fail(unsupported, "prefill_attention: head_dim: expected 64, 80, 96, 128 or 256, got %d", shape.dim);
  if (!(shape.scale > 0.0f) || shape.scale > 1e30f)
    return fail(invalid_argument, "prefill_attention: scale: expected a positive number, got %g",
                static_cast<double>(shape.scale));
  if (!(shape.softcap >= 0.0f) || shape.softcap > 1e30f)
    return fail(invalid_argument, "prefill_attention: softcap: expected at least 0, got %g",
                static_cast<double>(shape.softcap));
  if (a.sliding_window < 0)
    return fail(invalid_argument, "prefill_attention: sliding_window: expected at least 0, got %d", a.sliding_window);
  return ok;
}

std::int32_t check_step(const Step& step) {
  if (step.sequences < 0 || step.tokens < 0)
    return fail(invalid_argument, "prefill_attention: step: expected sizes from 0 on, got %d sequences, %d tokens",
                step.sequences, step.tokens);
  if (step.decodes < 0 || step.decodes > minimum(step.sequences, step.tokens))
    return fail(invalid_argument, "prefill_attention: decodes: expected 0 to %d, got %d",
                minimum(step.sequences, step.tokens), step.decodes);
  const std::int64_t chunks = step.sequences - step.decodes, rows = step.tokens - step.decodes;
  if (chunks == 0 ? rows != 0 : rows < chunks)
    return fail(invalid_argument, "prefill_attention: tokens: expected %s%lld, got %d", chunks == 0 ? "" : "at least ",
                static_cast<long long>(step.decodes + chunks), step.tokens);
  if (chunks > 0 && (step.longest_chunk < 1 || step.longest_chunk * chunks < rows))
    return fail(invalid_argument, "prefill_attention: longest_chunk: expected at least %lld, got %d",
                static_cast<long long>((rows + chunks - 1) / chunks), step.longest_chunk);
  if (chunks > 0 && step.full_columns < 1)
    return fail(invalid_argument, "prefill_attention: full_columns: expected at least 1, got %d", step.full_columns);
  if (step.compressed_columns < 0)
    return fail(invalid_argument, "prefill_attention: compressed_columns: expected at least 0, got %d",
                step.compressed_columns);
  if (chunks > kMostBlocks)
    return fail(unsupported, "prefill_attention: sequences: expected at most %d prefill chunks, got %lld", kMostBlocks,
                static_cast<long long>(chunks));
  return ok;
}

// What kernels count in 32 bits: rows of chunks, positions of all query heads, entries of tables, blocks of heads.
std::int32_t check_counts(const AttentionArguments& a) {
  const Step& step = a.step;
  const std::int64_t group = a.shape.query_heads / a.shape.heads, longest = step.longest_chunk;
  const std::int64_t columns = std::int64_t{step.full_columns} + step.compressed_columns;
  const struct {
    const char* what;
    std::int64_t count, most;
  } all[] = {
      {"longest_chunk: queries of all query heads of a KV head", longest * group, kMostBlocks * std::int64_t{64}},
      {"full_columns and compressed_columns: positions times query heads of a KV head", columns * kBlockSize * group,
       kEndOfContext},
      {"full_table: entries", std::int64_t{step.sequences} * step.full_columns, kEndOfContext},
      {"compressed_table: blocks of all KV heads",
       std::int64_t{step.sequences} * step.compressed_columns * a.shape.heads, kEndOfContext},
      {"full_blocks: blocks of all KV heads", std::int64_t{a.full_blocks} * 2 * a.shape.heads, kEndOfContext},
  };
  for (const auto& counted : all) {
    if (counted.count > counted.most)
      return fail(unsupported, "prefill_attention: %s: expected at most %lld, got %lld", counted.what,
                  static_cast<long long>(counted.most), static_cast<long long>(counted.count));
  }
  return ok;
}

std::int32_t check_stream(const char* name, const AttentionArguments& a, const StreamShape& shape, Part part) {
  if (shape.part != part) return fail(invalid_argument, "prefill_attention: %s is a stream of the other part", name);
  if (shape.heads != a.shape.heads || shape.dim != a.shape.dim)
    return fail(invalid_argument, "prefill_attention: %s: expected %d KV heads of %d, got %d of %d", name,
                a.shape.heads, a.shape.dim, shape.heads, shape.dim);
  return ok;
}

std::int32_t check_pointers(const AttentionArguments& a, const void* workspace) {
  const Step& step = a.step;
  const bool compressed = has_history(a);
  const struct {
    bool needed;
    Required required;
  } all[] = {
      {true, {"kv", a.kv, 16}},
      {true, {"q", a.q, 16}},
      {true, {"out", a.out, 16}},
      {true, {"query_start", step.query_start, 4}},
      {true, {"context_len", step.context_len, 4}},
      {true, {"full_table", step.full_table, 4}},
      {compressed, {"compressed_len", step.compressed_len, 4}},
      {compressed, {"compressed_table", step.compressed_table, 4}},
      {compressed, {"workspace", workspace, 16}},
  };
  for (const auto& pointer : all) {
    if (pointer.needed && !check_pointer(kName, pointer.required)) return invalid_argument;
  }
  if (a.full_blocks < 1)
    return fail(invalid_argument, "prefill_attention: full_blocks: expected at least 1, got %d", a.full_blocks);
  const std::int64_t row = static_cast<std::int64_t>(a.shape.query_heads) * a.shape.dim, unit = 16 / bytes_of(a.type);
  if (a.q_stride < row || a.q_stride % unit != 0)
    return fail(invalid_argument, "prefill_attention: q_stride: expected a multiple of %lld from %lld on, got %lld",
                static_cast<long long>(unit), static_cast<long long>(row), static_cast<long long>(a.q_stride));
  if (a.out_stride < row || a.out_stride % unit != 0)
    return fail(invalid_argument, "prefill_attention: out_stride: expected a multiple of %lld from %lld on, got %lld",
                static_cast<long long>(unit), static_cast<long long>(row), static_cast<long long>(a.out_stride));
  return ok;
}

// Everything but the pointers, which the size of the workspace does not depend on.
std::int32_t check_sizes(const AttentionArguments* arguments) {
  if (arguments == nullptr) return fail(invalid_argument, "prefill_attention: arguments is null");
  const AttentionArguments& a = *arguments;
  if (const std::int32_t status = check_shape(a)) return status;
  if (const std::int32_t status = check_step(a.step)) return status;
  if (const std::int32_t status = check_counts(a)) return status;
  if ((a.key.shape == nullptr) != (a.value.shape == nullptr))
    return fail(invalid_argument, "prefill_attention: %s is null, but the other stream is not",
                a.key.shape == nullptr ? "key" : "value");
  if (a.key.shape == nullptr) return ok;
  if (const std::int32_t status = check_stream("key", a, *a.key.shape, Part::key)) return status;
  return check_stream("value", a, *a.value.shape, Part::value);
}

// Keys and values of blocks [first, first + columns) of each chunk's compressed tier into the workspace.
std::int32_t restore_history(const AttentionArguments& a, const PrefillWorkspace& workspace, char* base,
                             std::int32_t first, void* stream) {
  auto* const blocks = reinterpret_cast<std::int32_t*>(base + workspace.blocks);
  auto* const block_index = reinterpret_cast<std::int32_t*>(base + workspace.block_index);
  const int chunks = a.step.sequences - a.step.decodes, columns = workspace.columns;
  const Grid grid{ceil_div(columns, HistoryBlocks::kThreads), chunks, 1};
  const HistoryBlocks::Arguments list{a.step, first, columns, a.sliding_window, blocks, block_index};
  if (const std::int32_t status = launch_kernel<HistoryBlocks>(kName, grid, 0, list, stream)) return status;
  auto restore = [&](const StreamView& view, std::int64_t out) {
    return minicache_restore_blocks(a.type, &view, blocks, block_index, chunks * columns, a.shape.inverse_frequencies,
                                    base + out, base + workspace.restoring, workspace.restoring_bytes, stream);
  };
  if (const std::int32_t status = restore(a.key, workspace.keys)) return status;
  return restore(a.value, workspace.values);
}

template <class T, int D, int Rows>
std::int32_t attend_piece(const AttentionArguments& a, const PrefillWorkspace& workspace, char* base,
                          std::int32_t first, bool last, void* stream) {
  using Kernel = PrefillAttention<T, D, Rows>;
  const Step& step = a.step;
  const int longest = minimum(step.longest_chunk, step.tokens - step.decodes);
  // A window as wide as the tables hides nothing.
  const std::int64_t positions = (std::int64_t{step.full_columns} + step.compressed_columns) * kBlockSize;
  const int window = a.sliding_window < positions ? a.sliding_window : 0;
  const int tiles = ceil_div(longest * (a.shape.query_heads / a.shape.heads), Kernel::kTileRows);
  const PrefillArguments<T> arguments{
      a.shape,
      step,
      FullTier<T>{static_cast<T*>(a.kv), a.shape.heads, a.shape.dim},
      RestoredHistory<T>{reinterpret_cast<const T*>(base + workspace.keys),
                         reinterpret_cast<const T*>(base + workspace.values), first, workspace.columns},
      PrefillCarry{reinterpret_cast<float*>(base + workspace.accumulators),
                   reinterpret_cast<float*>(base + workspace.maxima), reinterpret_cast<float*>(base + workspace.sums)},
      static_cast<const T*>(a.q),
      static_cast<T*>(a.out),
      a.q_stride,
      a.out_stride,
      SoftCap(a.shape.softcap / a.shape.scale),
      window,
      tiles,
      last};
  const Grid grid{a.shape.heads, step.sequences - step.decodes, tiles};
  return launch_kernel<Kernel>(kName, grid, Kernel::kSharedBytes, arguments, stream);
}

template <class T, int D>
std::int32_t attend(const AttentionArguments& a, const PrefillWorkspace& workspace, char* base, void* stream) {
  const Step& step = a.step;
  const std::int64_t rows = static_cast<std::int64_t>(step.longest_chunk) * (a.shape.query_heads / a.shape.heads);
  const std::int64_t grid = (rows + 127) / 128 * a.shape.heads * (step.sequences - step.decodes);
  constexpr int kMostRows = D > 128 ? 1 : 2;
  const auto launch_piece = grid < kFullGrid ? attend_piece<T, D, 1> : attend_piece<T, D, kMostRows>;
  const int pieces = maximum(1, workspace.pieces);
  for (int piece = 0; piece < pieces; ++piece) {
    const std::int32_t first = piece * workspace.columns;
    if (workspace.pieces > 0) {
      if (const std::int32_t status = restore_history(a, workspace, base, first, stream)) return status;
    }
    if (const std::int32_t status = launch_piece(a, workspace, base, first, piece + 1 == pieces, stream)) return status;
  }
  return ok;
}

template <class T>
std::int32_t attend(const AttentionArguments& a, const PrefillWorkspace& workspace, char* base, void* stream) {
  switch (a.shape.dim) {
    case 64:
      return attend<T, 64>(a, workspace, base, stream);
    case 128:
      return attend<T, 128>(a, workspace, base, stream);
#if !defined(MINICACHE_REDUCED)
    case 80:
      return attend<T, 80>(a, workspace, base, stream);
    case 96:
      return attend<T, 96>(a, workspace, base, stream);
    case 256:
      return attend<T, 256>(a, workspace, base, stream);
#endif
    default:
      return fail(unsupported, "prefill_attention: head_dim %d is not in this build", a.shape.dim);
  }
}

}  // namespace
}  // namespace minicache

MC_API std::int64_t minicache_prefill_workspace(const minicache::AttentionArguments* arguments) {
  using namespace minicache;
  if (check_sizes(arguments) != ok) return -1;
  return PrefillWorkspace::recommended_bytes(*arguments);
}

MC_API std::int32_t minicache_prefill_attention(const minicache::AttentionArguments* arguments, void* workspace,
                                                std::int64_t workspace_bytes, void* stream) {
  using namespace minicache;
  if (const std::int32_t status = check_sizes(arguments)) return status;
  const AttentionArguments& a = *arguments;
  if (empty(a)) return ok;
  if (const std::int32_t status = check_pointers(a, workspace)) return status;
  const PrefillWorkspace parts = PrefillWorkspace::within(a, workspace_bytes);
  if (parts.bytes > workspace_bytes)
    return fail(invalid_argument, "prefill_attention: workspace_bytes: expected at least %lld, got %lld",
                static_cast<long long>(parts.bytes), static_cast<long long>(workspace_bytes));
  char* const base = static_cast<char*>(workspace);
  return with_type(kName, a.type, [&](auto number) { return attend<decltype(number)>(a, parts, base, stream); });
}
