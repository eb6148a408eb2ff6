// What the current device offers a launcher that chooses how much a thread block takes on.
#pragma once

#include "errors.h"

namespace minicache {

struct DeviceLimits {
  int block, processor;  // bytes of shared memory that a thread block may have, and that a multiprocessor has
  int processors;
};

inline std::int32_t device_limits(const char* name, DeviceLimits& limits) {
#if defined(__CUDACC__)
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(limits.block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(limits.processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(limits.processors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) cudaGetLastError();  // reported here
  return finish(name, error);
#else
  static_cast<void>(name);
  limits = {1 << 30, 228 * 1024, 1};
  return ok;
#endif
}

inline std::int32_t too_large(const char* name, int bytes, const DeviceLimits& limits) {
  return fail(unsupported, "%s: a block of these streams takes %d bytes of shared memory, the device has %d", name,
              bytes, limits.block);
}

}  // namespace minicache
