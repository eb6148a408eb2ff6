// How launchers report what is wrong with their arguments.
#pragma once

#include "api.h"
#include "minicache/descriptor.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace minicache {

Error& last_error();  // of the calling thread

// Records the message and returns the code.
template <class... Values>
std::int32_t fail(Status status, const char* format, Values... values) {
  last_error()(format, values...);
  return status;
}

inline bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

#if defined(__CUDACC__)
inline std::int32_t finish(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return ok;
  return fail(device_error, "%s: %s", kernel, cudaGetErrorString(error));
}
#endif

}  // namespace minicache
