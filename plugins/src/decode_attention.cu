// minicache_decode_attention: checks its arguments, lays out workspace, launches.
#include "minicache/decode_attention.cuh"

#include "decode_checks.h"
#include "device_limits.h"
#include "launching.h"

namespace minicache {
namespace {

DecodeSizes sizes_of(const AttentionArguments& a) {
  const bool compressed = a.key.shape != nullptr;
  return {static_cast<std::int64_t>(a.step.decodes) * a.shape.query_heads,
          a.shape.dim,
          ceil_div(a.step.full_columns, kSplitBlocks),
          compressed ? ceil_div(a.step.compressed_columns, kSplitBlocks) : 0,
          a.key.shape,
          a.value.shape,
          &a.key.maps,
          &a.value.maps};
}

// One call with its pointers typed.
template <class T>
struct DecodeAttention {
  const AttentionArguments& a;
  DecodeSizes sizes;
  DecodeWorkspace layout;
  DecodeProblem<T> problem;
  int kind;  // of the compressed tier's streams
  StreamReader key, value;
  char* workspace;
  void* stream;

  DecodeAttention(const AttentionArguments& arguments, void* memory, void* on)
      : a(arguments), sizes(sizes_of(a)), layout(decode_workspace<T>(sizes)), kind(kGeneral), key{}, value{},
        workspace(static_cast<char*>(memory)), stream(on) {
    const int group = a.shape.query_heads / a.shape.heads;
    problem = {a.shape, a.step, a.sliding_window, group, ceil_div(group, kQueryTile), sizes.full_splits,
               sizes.compressed_splits, static_cast<const T*>(a.q), a.q_stride};
    if (sizes.compressed()) read_as(kind_of(*a.key.shape, *a.value.shape));
  }
  void read_as(int known) {
    kind = known;
    key = stream_reader<T>(*a.key.shape, a.key.pools, a.key.maps, is_known(kind));
    value = stream_reader<T>(*a.value.shape, a.value.pools, a.value.maps, is_known(kind));
  }

  float* at(std::int64_t offset) const { return offset < 0 ? nullptr : reinterpret_cast<float*>(workspace + offset); }
  Partials full() const { return {at(layout.full), sizes.full_splits, kRecordHead + a.shape.dim}; }
  Partials compressed() const {
    if (!sizes.compressed()) return {nullptr, 0, 0};
    return {at(layout.compressed), sizes.compressed_splits, compressed_record(value.shape)};
  }
  Grid splits(int count) const { return {count, a.shape.heads * problem.tiles, a.step.decodes}; }

  std::int32_t run() {
    std::int32_t status = run_full();
    if (status == ok && sizes.compressed()) status = run_compressed();
    return status == ok ? combine() : status;
  }

 private:
  template <int D>
  std::int32_t run_full_of() const {
    using Kernel = FullSplit<T, D>;
    const FullSplitArguments<T> arguments{problem, {static_cast<T*>(a.kv), a.shape.heads, a.shape.dim}, full()};
    return launch_kernel<Kernel>(kName, splits(sizes.full_splits), Kernel::kShared, arguments, stream);
  }

  std::int32_t run_full() const {
    switch (a.shape.dim) {
      case 64:
        return run_full_of<64>();
      case 80:
        return run_full_of<80>();
      case 96:
        return run_full_of<96>();
      case 128:
        return run_full_of<128>();
      default:
        return run_full_of<256>();
    }
  }

  // Rows that maps are applied to.
  int map_rows() const { return a.step.decodes * problem.group; }
  bool few_rows() const { return map_rows() <= 8 * kFewMapTiles; }

  std::int32_t map_queries() const {
    const ReadMaps& maps = key.maps;
    const StreamShape& shape = key.shape;
    const QueryMapArguments<T> arguments{
        problem,
        maps.slots,
        {{maps.map, maps.map_heads, shape.stored},
         {maps.residual_map, shape.heads, shape.dim},
         {maps.offset, shape.heads, 1}},
        {at(layout.query_latent), at(layout.query_residual), at(layout.query_offset)}};
    return few_rows() ? map_queries<kFewMapTiles>(arguments) : map_queries<kMapTiles>(arguments);
  }

  template <int Tiles>
  std::int32_t map_queries(const QueryMapArguments<T>& arguments) const {
    using Kernel = QueryMap<T, Tiles>;
    int tiles = 0;
    for (int n = 0; n < kQueryMaps; ++n) tiles += Kernel::tiles(arguments, n);
    return launch_kernel<Kernel>(kName, {tiles, ceil_div(map_rows(), Kernel::kRows), a.shape.heads}, Kernel::kShared,
                                 arguments, stream);
  }

  std::int32_t run_compressed() {
    CompressedShared shared{};
    std::int32_t status = choose_shared(shared);
    if (status == ok && sizes.maps_query()) status = map_queries();
    if (status == ok && sizes.rebuilt()) {
      using Kernel = MapFragments<T, PlaceTurns<T>>;
      const PlaceTurns<T> turns{a.shape.inverse_frequencies, workspace + layout.turns};
      const auto arguments = Kernel::Arguments::of(key, kind, false, workspace + layout.map_fragments, turns);
      status = launch_kernel<Kernel>(kName, Kernel::grid(arguments, 1), 0, arguments, stream);
    }
    const CompressedSplitArguments<T> arguments{
        problem,
        key,
        value,
        {at(layout.query_latent), at(layout.query_residual), at(layout.query_offset)},
        at(layout.map_fragments),
        workspace + layout.turns,
        shared,
        compressed()};
    if (status != ok) return status;
    return splitter().launch(splits(sizes.compressed_splits), arguments, stream);
  }

  // The kernel for these streams; how many of its thread blocks there are registers for on a multiprocessor.
  struct Splitter {
    std::int32_t (*launch)(Grid, const CompressedSplitArguments<T>&, void*);
    int blocks;
  };
  Splitter splitter() const { return sizes.rebuilt() ? splitter_of<true>() : splitter_of<false>(); }

  template <bool Rebuild>
  Splitter splitter_of() const {
    switch (kind) {
      case 64:
        return splitter_of<Rebuild, 64>();
      case 128:
        return splitter_of<Rebuild, 128>();
      case kPlain:
        return splitter_of<Rebuild, kPlain>();
      case kWide:
        return splitter_of<Rebuild, kWide>();
      default:
        return splitter_of<Rebuild, kGeneral>();
    }
  }
  template <bool Rebuild, int Kind>
  static Splitter splitter_of() {
    return {launch_split<Rebuild, Kind>, CompressedSplit<T, Rebuild, Kind>::kMinBlocks};
  }

  template <bool Rebuild, int Kind>
  static std::int32_t launch_split(Grid grid, const CompressedSplitArguments<T>& arguments, void* stream) {
    return launch_kernel<CompressedSplit<T, Rebuild, Kind>>(kName, grid, arguments.shared.bytes, arguments, stream);
  }

  // Streams too large for the kernel that is made for them are read as general ones, if need be with a single stage
  // and with turns in global memory.
  std::int32_t choose_shared(CompressedShared& shared) {
    DeviceLimits limits{};
    if (const std::int32_t status = device_limits(kName, limits)) return status;
    if (finds_room(limits, shared)) return ok;
    if (kind != kGeneral) {
      read_as(kGeneral);
      if (finds_room(limits, shared)) return ok;
    }
    for (const CompressedRoom room : {CompressedRoom{2, false, false}, CompressedRoom{1, false, false}}) {
      if (fits(room, limits.block, limits, shared)) return ok;
    }
    return too_large(kName, shared.bytes, limits);
  }

  // As many thread blocks on a multiprocessor as there are registers for, then as many stages; what fits at all is
  // better than a map outside of shared memory.
  bool finds_room(const DeviceLimits& limits, CompressedShared& shared) const {
    constexpr int kReserved = 1024;  // of each thread block
    const bool long_stages = stage_blocks(sizes.rebuilt(), kind) > 1;
    for (const bool resident : {true, false}) {
      for (int blocks = splitter().blocks; blocks >= 2; --blocks) {
        for (int stages = long_stages ? 3 : 4; stages >= (long_stages || blocks == 2 ? 2 : 3); --stages) {
          const CompressedRoom room{stages, resident, true};
          if (fits(room, limits.processor / blocks - kReserved, limits, shared)) return true;
        }
      }
      if (fits({2, resident, true}, limits.block, limits, shared)) return true;
    }
    return false;
  }

  bool fits(const CompressedRoom& room, int bytes, const DeviceLimits& limits, CompressedShared& shared) const {
    shared = compressed_shared<T>(key, value, kind, room);
    return shared.bytes <= minimum(bytes, limits.block);
  }

  std::int32_t combine() const {
    const bool mapped = sizes.maps_output();
    T* out = static_cast<T*>(a.out);
    const CombineArguments<T> arguments{problem, full(), compressed(), value, mapped, at(layout.sums),
                                        at(layout.residual_sums), at(layout.plain), out, a.out_stride};
    const int shared = kDecodeWarps * (sizes.full_splits + sizes.compressed_splits) * 4;
    const std::int32_t status =
        launch_kernel<CombineSplits<T>>(kName, {ceil_div(a.shape.query_heads, kDecodeWarps), a.step.decodes, 1}, shared,
                                        arguments, stream);
    if (status != ok || !mapped) return status;
    const StreamShape& shape = value.shape;
    const OutputMapArguments<T> map{problem,
                                    value.maps.slots,
                                    {value.maps.map, value.maps.map_heads, shape.stored},
                                    {value.maps.residual_map, shape.heads, shape.dim},
                                    at(layout.sums),
                                    at(layout.residual_sums),
                                    at(layout.plain),
                                    out,
                                    a.out_stride};
    return few_rows() ? map_output<kFewMapTiles>(map) : map_output<kMapTiles>(map);
  }

  template <int Tiles>
  std::int32_t map_output(const OutputMapArguments<T>& map) const {
    using Kernel = OutputMap<T, Tiles>;
    const Grid grid{ceil_div(a.shape.dim, Kernel::kColumns), ceil_div(map_rows(), Kernel::kRows), a.shape.heads};
    return launch_kernel<Kernel>(kName, grid, Kernel::kShared, map, stream);
  }
};

template <class T>
std::int32_t run(const AttentionArguments& a, void* workspace, void* stream) {
  return DecodeAttention<T>(a, workspace, stream).run();
}

}  // namespace
}  // namespace minicache

MC_API std::int64_t minicache_decode_workspace(const minicache::AttentionArguments* arguments) {
  using namespace minicache;
  if (arguments == nullptr || check_shape(*arguments) != ok) return 0;
  const DecodeSizes sizes = sizes_of(*arguments);
  return arguments->type == Type::float32 ? decode_workspace<float>(sizes).bytes : decode_workspace<Half>(sizes).bytes;
}

MC_API std::int32_t minicache_decode_attention(const minicache::AttentionArguments* arguments, void* workspace,
                                               std::int64_t workspace_bytes, void* stream) {
  using namespace minicache;
  if (arguments == nullptr) return missing("arguments");
  const AttentionArguments& a = *arguments;
  if (const std::int32_t status = check_shape(a)) return status;
  if (a.step.decodes == 0) return ok;
  if (const std::int32_t status = check_pointers(a, a.type == Type::float32 ? 4 : 2)) return status;
  const std::int64_t needed = minicache_decode_workspace(arguments);
  if (workspace == nullptr) return missing("workspace");
  if (!aligned(workspace, 16)) return fail(invalid_argument, "%s: workspace is not aligned to 16 bytes", kName);
  if (workspace_bytes < needed) {
    return fail(invalid_argument, "%s: workspace_bytes: expected at least %lld, got %lld", kName,
                static_cast<long long>(needed), static_cast<long long>(workspace_bytes));
  }
  switch (a.type) {
#if !defined(__CUDACC__)
    case Type::float32:
      return run<float>(a, workspace, stream);
#endif
    case Type::float16:
      return run<Half>(a, workspace, stream);
#if !defined(MINICACHE_REDUCED)
    case Type::bfloat16:
      return run<BFloat16>(a, workspace, stream);
#endif
    default:
      return fail(unsupported, "%s: type: number %d is not supported here", kName, static_cast<int>(a.type));
  }
}
