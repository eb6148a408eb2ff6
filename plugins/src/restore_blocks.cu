// Launcher of restoring.
#include "launching.h"
#include "minicache/restore.cuh"

namespace minicache {
namespace {

constexpr const char* kName = "restore_blocks";

bool check_maps(const StreamShape& shape, const ReadMaps& maps) {
  const bool linear = shape.merge == Merge::linear, products = takes_products(shape);
  const struct {
    bool needed;
    Required required;
  } all[] = {
      {products, {"maps.map", maps.map, 16}},
      {linear, {"maps.offset", maps.offset, 16}},
      {shape.align && shape.has_residual(), {"maps.residual_map", maps.residual_map, 16}},
      {shape.match_heads, {"maps.slots", maps.slots, 8}},
  };
  for (const auto& map : all) {
    if (map.needed && !check_pointer(kName, map.required)) return false;
  }
  if (products && maps.map_heads != 1 && maps.map_heads != shape.heads)
    return last_error()("%s: maps.map_heads: expected 1 or %d, got %d", kName, shape.heads, maps.map_heads);
  return true;
}

}  // namespace
}  // namespace minicache

MC_API std::int32_t minicache_restore_blocks(minicache::Type type, const minicache::StreamView* stream_view,
                                             const std::int32_t* blocks, const std::int32_t* block_index,
                                             std::int32_t count, const float* inverse_frequencies, void* out,
                                             void* stream) {
  using namespace minicache;
  if (stream_view == nullptr || stream_view->shape == nullptr)
    return fail(invalid_argument, "%s: the stream's shape is null", kName);
  if (count < 0) return fail(invalid_argument, "%s: expected a count of at least 0, got %d", kName, count);
  if (count == 0) return ok;
  const StreamShape& shape = *stream_view->shape;
  for (const Required& required : {Required{"blocks", blocks, 4}, Required{"out", out, 16}}) {
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
    const RestoreArguments<T> arguments{shape,       stream_view->pools,  stream_view->maps,   blocks,
                                        block_index, inverse_frequencies, static_cast<T*>(out)};
    const Grid grid{count, shape.heads};
    const int shared = RestoreScratch<T>(nullptr, shape).bytes;
    if (takes_products(shape))
      return launch_kernel<RestoreKernel<T, 1, true>>(kName, grid, shared, arguments, stream);
    return with_chunks(shape.dim, [&](auto chunks) {
      return launch_kernel<RestoreKernel<T, decltype(chunks)::value, false>>(kName, grid, shared, arguments, stream);
    });
  });
}
