// What the launchers of the codec share: types, checks of arguments, a launch that is the same on both sides.
#pragma once

#include "device_limits.h"
#include "minicache/block.cuh"

namespace minicache {

template <class Kernel, class Arguments>
std::int32_t launch_kernel(const char* name, Grid grid, int shared, const Arguments& arguments, void* stream) {
#if defined(__CUDACC__)
  const cudaError_t error = launch<Kernel>(grid, shared, arguments, static_cast<cudaStream_t>(stream));
  DeviceLimits limits{};
  if (error == cudaErrorInvalidValue && device_limits(name, limits) == ok && shared > limits.block)
    return too_large(name, shared, limits);
  return finish(name, error);
#else
  static_cast<void>(name);
  static_cast<void>(stream);
  launch<Kernel>(grid, shared, arguments);
  return ok;
#endif
}

// Calls `function(T{})` for a compute type.
template <class Function>
std::int32_t with_type(const char* name, Type type, Function function) {
  switch (type) {
    case Type::float16:
      return function(Half{});
#if !defined(MINICACHE_REDUCED)
    case Type::bfloat16:
      return function(BFloat16{});
#endif
#if !defined(__CUDACC__)
    case Type::float32:
      return function(float{});
#endif
    default:
      return fail(unsupported, "%s: type %d is not supported by this library", name, static_cast<int>(type));
  }
}

// A count of chunks per thread that holds `width` components, as a constant.
template <int Chunks>
struct ChunkCount {
  static constexpr int value = Chunks;
};

template <class Function>
std::int32_t with_chunks(int width, Function function) {
  if (width <= 64) return function(ChunkCount<2>{});
  if (width <= 128) return function(ChunkCount<4>{});
#if defined(MINICACHE_REDUCED)
  return fail(unsupported, "vectors of %d components are not in this build", width);
#else
  return function(ChunkCount<8>{});
#endif
}

// A pointer every call needs, on a boundary of `bytes`.
struct Required {
  const char* name;
  const void* pointer;
  std::size_t bytes;
};

inline bool check_pointer(const char* function, const Required& required) {
  if (required.pointer == nullptr)
    return last_error()("%s: %s is null", function, required.name);
  if (!aligned(required.pointer, required.bytes))
    return last_error()("%s: %s is not aligned to %d bytes", function, required.name,
                        static_cast<int>(required.bytes));
  return true;
}

// Pools a stream of this shape needs are there.
bool check_pools(const char* function, const StreamShape& shape, const StreamPools& pools);

}  // namespace minicache
