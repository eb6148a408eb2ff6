// Launcher of restoring.
#include "device_limits.h"
#include "launching.h"
#include "minicache/restore.cuh"
#include "minicache/rotation.cuh"

namespace minicache {
namespace {

constexpr const char* kName = "restore_blocks";

bool check_maps(const StreamShape& shape, const ReadMaps& maps) {
  const struct {
    bool needed;
    Required required;
  } all[] = {
      {shape.has_map(), {"maps.map", maps.map, 16}},
      {shape.merge == Merge::linear, {"maps.offset", maps.offset, 16}},
      {shape.align && shape.has_residual(), {"maps.residual_map", maps.residual_map, 16}},
      {shape.match_heads, {"maps.slots", maps.slots, 8}},
  };
  for (const auto& map : all) {
    if (map.needed && !check_pointer(kName, map.required)) return false;
  }
  if (shape.has_map() && maps.map_heads != 1 && maps.map_heads != shape.heads)
    return last_error()("%s: maps.map_heads: expected 1 or %d, got %d", kName, shape.heads, maps.map_heads);
  return true;
}

// Byte offsets of the parts.
struct RestoreWorkspace {
  std::int64_t turns, bytes;  // map fragments come first
};

template <class T>
RestoreWorkspace workspace_of(const StreamShape& shape, std::int32_t count) {
  const std::int64_t fragments = (map_fragment_bytes<T>(shape) + 255) / 256 * 256;
  return {fragments, fragments + (turned(shape) ? BlockTurns<T>::bytes(shape.dim, count) : 0)};
}

// One call with its pointers typed.
template <class T>
struct Restore {
  RestoreArguments<T> arguments;
  BlockTurns<T> turns;
  void* fragments;  // of the maps
  void* stream;

  std::int32_t run() {
    using Prepare = MapFragments<T, BlockTurns<T>>;
    const StreamReader& reader = arguments.reader;
    const int kind = kind_of(reader.shape, reader.shape), tables = arguments.turns == nullptr ? 0 : arguments.count;
    const auto prepare = Prepare::Arguments::of(reader, kind, true, fragments, turns);
    if (const std::int32_t status = launch_kernel<Prepare>(kName, Prepare::grid(prepare, tables), 0, prepare, stream))
      return status;
    switch (kind) {
      case 64:
        return launch<64>();
      case 128:
        return launch<128>();
      case kPlain:
        return launch<kPlain>();
      case kWide:
        return launch<kWide>();
      default:
        return launch<kGeneral>();
    }
  }

 private:
  template <int Kind>
  std::int32_t launch() {
    using Kernel = RestoreKernel<T, Kind>;
    DeviceLimits limits{};
    if (const std::int32_t status = device_limits(kName, limits)) return status;
    if (const std::int32_t status = choose_shared(Kernel::kMinBlocks, limits)) return status;
    // Maps stay in shared memory over as many rounds as make one wave of thread blocks.
    const int heads = arguments.reader.shape.heads, rounds = ceil_div(arguments.count, Kernel::kTiles);
    const std::int64_t places = std::int64_t{Kernel::kMinBlocks} * limits.processors;
    const auto each = static_cast<int>((std::int64_t{rounds} * heads + places - 1) / places);
    arguments.groups = ceil_div(rounds, each);
    return launch_kernel<Kernel>(kName, {arguments.groups, heads, 1}, arguments.shared.bytes, arguments, stream);
  }

  // As many thread blocks on a multiprocessor as there are registers for (`most`), the map in shared memory; then what
  // fits.
  std::int32_t choose_shared(int most, const DeviceLimits& limits) {
    constexpr int kReserved = 1024;  // of each thread block
    RestoreShared& shared = arguments.shared;
    for (const bool resident : {true, false}) {
      for (int blocks = most; blocks >= 1; --blocks) {
        const int room = minimum(limits.processor / blocks - kReserved, limits.block);
        for (int stages = 3; stages >= (resident || blocks > 1 ? 2 : 1); --stages) {
          shared = restore_shared<T>(arguments.reader, stages, resident);
          if (shared.bytes <= room) return ok;
        }
      }
    }
    return too_large(kName, shared.bytes, limits);
  }
};

}  // namespace
}  // namespace minicache

MC_API std::int64_t minicache_restore_workspace(minicache::Type type, const minicache::StreamShape* shape,
                                                std::int32_t count) {
  using namespace minicache;
  if (shape == nullptr || count < 1) return 0;
  return type == Type::float32 ? workspace_of<float>(*shape, count).bytes : workspace_of<Half>(*shape, count).bytes;
}

MC_API std::int32_t minicache_restore_blocks(minicache::Type type, const minicache::StreamView* stream_view,
                                             const std::int32_t* blocks, const std::int32_t* block_index,
                                             std::int32_t count, const float* inverse_frequencies, void* out,
                                             void* workspace, std::int64_t workspace_bytes, void* stream) {
  using namespace minicache;
  if (stream_view == nullptr || stream_view->shape == nullptr)
    return fail(invalid_argument, "%s: the stream's shape is null", kName);
  if (count < 0) return fail(invalid_argument, "%s: expected a count of at least 0, got %d", kName, count);
  if (count == 0) return ok;
  const StreamShape& shape = *stream_view->shape;
  for (const Required& required :
       {Required{"blocks", blocks, 4}, Required{"out", out, 16}, Required{"workspace", workspace, 16}}) {
    if (!check_pointer(kName, required)) return invalid_argument;
  }
  if (turned(shape)) {
    for (const Required& required :
         {Required{"block_index", block_index, 4}, Required{"inverse_frequencies", inverse_frequencies, 4}}) {
      if (!check_pointer(kName, required)) return invalid_argument;
    }
  }
  if (!check_pools(kName, shape, stream_view->pools) || !check_maps(shape, stream_view->maps)) return invalid_argument;
  return with_type(kName, type, [&](auto number) {
    using T = decltype(number);
    const RestoreWorkspace parts = workspace_of<T>(shape, count);
    if (workspace_bytes < parts.bytes)
      return fail(invalid_argument, "%s: workspace_bytes: expected at least %lld, got %lld", kName,
                  static_cast<long long>(parts.bytes), static_cast<long long>(workspace_bytes));
    auto* const memory = static_cast<char*>(workspace);
    auto* const table = turned(shape) ? reinterpret_cast<TurnPair<Code<T>>*>(memory + parts.turns) : nullptr;
    const bool known = is_known(kind_of(shape, shape));
    const StreamReader reader = stream_reader<T>(shape, stream_view->pools, stream_view->maps, known);
    return Restore<T>{{reader, blocks, count, 0, memory, table, static_cast<T*>(out), {}},
                      {inverse_frequencies, blocks, block_index, table},
                      memory,
                      stream}
        .run();
  });
}
