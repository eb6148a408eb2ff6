// Launcher of compression.
#include <cmath>

#include "device_limits.h"
#include "launching.h"
#include "minicache/compress.cuh"
#include "minicache/map_vectors.cuh"

namespace minicache {
namespace {

constexpr const char* kName = "compress_blocks";

// Byte offsets of the parts of the workspace.
struct Workspace {
  std::int64_t vectors = 0, statistics = 0, rotations = 0, split = 0;
  std::int64_t bytes = 0;

  Workspace(Type type, const StreamShape& shape, std::int64_t count) {
    const std::int64_t rows = count * shape.heads * kBlockSize;
    const bool linear = shape.merge == Merge::linear, maps = linear || shape.align;
    vectors = take(4 * (linear ? rows * shape.stored : shape.align ? rows * shape.members * shape.dim : 0));
    statistics = take(4 * rows * statistics_of(shape));
    rotations = take(turned(shape) ? 4 * count * Rotation::numbers(shape.dim) : 0);
    if (!turned(shape) || !maps || type == Type::float32) return;
    const MapKernel<Half, true>::Pieces pieces{
        nullptr, shape.heads, ceil_div(linear ? shape.stored : shape.dim, kExactColumns), exact_pieces(shape.dim)};
    split = take(pieces.bytes(shape.members));
  }

 private:
  std::int64_t take(std::int64_t size) {
    const std::int64_t offset = bytes;
    bytes += (size + 255) / 256 * 256;
    return offset;
  }
};

bool check_maps(const StreamShape& shape, const WriteMaps& maps) {
  const auto required = [&](bool needed, const char* name, const void* pointer, std::size_t bytes = 16) {
    return !needed || check_pointer(kName, Required{name, pointer, bytes});
  };
  const bool linear = shape.merge == Merge::linear;
  if (!required(shape.match_heads, "maps.heads", maps.heads, 8)) return false;
  if (!linear) return required(shape.align, "maps.align", maps.align);
  if (!required(true, "maps.encode", maps.encode) || !required(true, "maps.bias", maps.bias)) return false;
  for (int i = 0; i < shape.members && shape.retained > 0; ++i) {
    if (!required(true, "maps.map", maps.map[i]) || !required(true, "maps.offset", maps.offset[i])) return false;
  }
  return true;
}

// Shares of the layers in a spherical mean: t^i (1 - t)^(m - 1 - i), adding up to 1.
void layer_shares(const StreamShape& shape, float* shares) {
  double total = 0.0, raw[kMaxGroup];
  for (int i = 0; i < shape.members; ++i) {
    raw[i] = std::pow(static_cast<double>(shape.t), i) * std::pow(1.0 - shape.t, shape.members - 1 - i);
    total += raw[i];
  }
  for (int i = 0; i < shape.members; ++i) shares[i] = static_cast<float>(raw[i] / total);
}

template <int Chunks, class T>
std::int32_t launch_products(Grid grid, const CompressArguments<T>& a, void* stream) {
  using Kernel = ProductsKernel<T, Chunks>;
  return launch_kernel<Kernel>(kName, grid, Kernel::shared_bytes(a.shape), a, stream);
}

template <class T, bool Turned>
std::int32_t launch_tensor_map(MapArguments<T> map, void* stream) {
  using Kernel = MapKernel<T, Turned>;
  using Scratch = typename Kernel::Scratch;
  DeviceLimits limits{};
  const std::int32_t status = device_limits(kName, limits);
  if (status != ok) return status;
  Grid grid{map.count, map.a.shape.heads, map.sums * Kernel::chunks_of(map)};
  map.resident = Kernel::kMayReside;
  // Room for all thread blocks of a multiprocessor, each with a KiB that is the system's.
  map.resident = map.resident && Kernel::kMinBlocks * (Scratch(nullptr, map).bytes + 1024) <= limits.processor;
  if (map.resident) {  // the cache blocks in one wave
    const std::int64_t all = static_cast<std::int64_t>(grid.x) * grid.y * grid.z;
    const std::int64_t places = static_cast<std::int64_t>(Kernel::kMinBlocks) * limits.processors;
    map.blocks_each = static_cast<std::int32_t>(minimum((all + places - 1) / places, std::int64_t{map.count}));
  }
  grid.x = ceil_div(map.count, map.blocks_each);
  return launch_kernel<Kernel>(kName, grid, Scratch(nullptr, map).bytes, map, stream);
}

template <class T>
std::int32_t launch_turned_map(const MapArguments<T>& map, void* stream) {
  using Kernel = MapKernel<T, true>;
  using Split = SplitMatrices<T, typename Kernel::E, Kernel::kParts>;
  const auto pieces = Kernel::Pieces::of(map);
  const Grid grid{map.a.shape.members * pieces.pieces, pieces.heads, pieces.chunks};
  if (const std::int32_t status = launch_kernel<Split>(kName, grid, 0, map, stream)) return status;
  return launch_tensor_map<T, true>(map, stream);
}

template <class T>
std::int32_t launch_map(const CompressArguments<T>& a, std::int32_t count, void* split, void* stream) {
  const StreamShape& shape = a.shape;
  const bool linear = shape.merge == Merge::linear;
  const MapArguments<T> map{a,
                            linear ? a.maps.encode : a.maps.align,
                            linear ? a.maps.bias : nullptr,
                            a.vectors,
                            linear ? shape.stored : shape.dim,
                            linear ? 1 : shape.members,
                            count,
                            1,
                            false,
                            split};
  if constexpr (sizeof(T) == 2) {
    return turned(shape) ? launch_turned_map(map, stream) : launch_tensor_map<T, false>(map, stream);
  } else {
    using Kernel = FloatMapKernel<T>;
    return launch_kernel<Kernel>(kName, Grid{count, shape.heads, map.sums}, Kernel::shared_bytes(map), map, stream);
  }
}

template <class T>
std::int32_t compress(CompressArguments<T> a, const RotationArguments& rotations, std::int32_t count, void* split,
                      void* stream) {
  const StreamShape& shape = a.shape;
  layer_shares(shape, a.shares);
  const Grid grid{count, shape.heads, 1};
  const bool linear = shape.merge == Merge::linear;
  std::int32_t status = ok;
  if (rotations.out != nullptr)
    status = launch_kernel<RotationKernel>(kName, RotationKernel::grid(count, shape.dim), 0, rotations, stream);
  if (status == ok && (linear || shape.align)) status = launch_map(a, count, split, stream);
  if (status == ok && linear && shape.retained > 0) {
    using Kernel = LossKernel<T>;
    status = launch_kernel<Kernel>(kName, grid, Kernel::map_of(nullptr, shape).bytes, a, stream);
  }
  if (status != ok) return status;
  return with_chunks(linear ? shape.stored : shape.dim, [&](auto chunks) {
    constexpr int kChunks = decltype(chunks)::value;
    if (shape.merge != Merge::linear && statistics_of(shape) > 0)
      status = launch_products<kChunks>(grid, a, stream);
    if (status != ok) return status;
    return launch_kernel<CompressKernel<T, kChunks>>(kName, grid, CompressScratch(nullptr, shape).bytes, a, stream);
  });
}

}  // namespace
}  // namespace minicache

MC_API std::int64_t minicache_compress_workspace(minicache::Type type, const minicache::StreamShape* shape,
                                                 std::int32_t count) {
  return shape == nullptr || count < 1 ? 0 : minicache::Workspace(type, *shape, count).bytes;
}

MC_API std::int32_t minicache_compress_blocks(minicache::Type type, const minicache::StreamShape* shape,
                                              const void* const* layers, const std::int32_t* source_blocks,
                                              const std::int32_t* target_blocks, const std::int32_t* block_index,
                                              std::int32_t count, const minicache::StreamPools* pools,
                                              const minicache::WriteMaps* maps, const float* inverse_frequencies,
                                              void* workspace, std::int64_t workspace_bytes, void* stream) {
  using namespace minicache;
  if (shape == nullptr) return fail(invalid_argument, "%s: shape is null", kName);
  if (count < 0) return fail(invalid_argument, "%s: expected a count of at least 0, got %d", kName, count);
  if (count == 0) return ok;
  for (const Required& required :
       {Required{"layers", layers, 8}, Required{"source_blocks", source_blocks, 4},
        Required{"target_blocks", target_blocks, 4}, Required{"block_index", block_index, 4}, Required{"pools", pools, 8},
        Required{"inverse_frequencies", turned(*shape) ? inverse_frequencies : &shape->t, 4}}) {
    if (!check_pointer(kName, required)) return invalid_argument;
  }
  for (int i = 0; i < shape->members; ++i) {
    if (!check_pointer(kName, Required{"layers[i]", layers[i], 16})) return invalid_argument;
  }
  const WriteMaps own_maps = maps == nullptr ? WriteMaps{} : *maps;
  if (!check_pools(kName, *shape, *pools) || !check_maps(*shape, own_maps)) return invalid_argument;
  const Workspace parts(type, *shape, count);
  if (parts.bytes > 0 && !check_pointer(kName, Required{"workspace", workspace, 16})) return invalid_argument;
  if (workspace_bytes < parts.bytes)
    return fail(invalid_argument, "%s: expected a workspace of at least %lld bytes, got %lld", kName,
                static_cast<long long>(parts.bytes), static_cast<long long>(workspace_bytes));
  return with_type(kName, type, [&](auto number) {
    using T = decltype(number);
    auto* const memory = static_cast<char*>(workspace);
    auto floats = [&](std::int64_t offset) { return reinterpret_cast<float*>(memory + offset); };
    float* const rotations = turned(*shape) ? floats(parts.rotations) : nullptr;
    CompressArguments<T> arguments{*shape,
                                   *pools,
                                   own_maps,
                                   {},
                                   source_blocks,
                                   target_blocks,
                                   block_index,
                                   rotations,
                                   {},
                                   floats(parts.vectors),
                                   statistics_of(*shape) > 0 ? floats(parts.statistics) : nullptr};
    for (int i = 0; i < shape->members; ++i) arguments.layers[i] = static_cast<const T*>(layers[i]);
    const RotationArguments turns{block_index, inverse_frequencies, shape->dim, rotations};
    return compress(arguments, turns, count, memory + parts.split, stream);
  });
}
