// Errors, version and stream descriptions: what every launcher shares.
#include <new>

#include "errors.h"

namespace minicache {

Error& last_error() {
  static thread_local Error error;
  return error;
}

}  // namespace minicache

MC_API const char* minicache_last_error() { return minicache::last_error().message; }

#if defined(__CUDACC__)
MC_API const char* minicache_version() { return "0.1.0 cuda" MINICACHE_TARGETS; }
#else
MC_API const char* minicache_version() { return "0.1.0 host"; }
#endif

MC_API minicache::StreamShape* minicache_stream_create(const std::int32_t* integers, std::int32_t count,
                                                       const float* floats, std::int32_t float_count,
                                                       std::int32_t heads, std::int32_t dim) {
  using namespace minicache;
  if (integers == nullptr || floats == nullptr) {
    fail(invalid_argument, "stream: expected a description, got null");
    return nullptr;
  }
  StreamShape* shape = new (std::nothrow) StreamShape{};
  if (shape == nullptr) {
    fail(device_error, "stream: out of host memory");
    return nullptr;
  }
  if (!parse_stream(integers, count, floats, float_count, heads, dim, *shape, last_error())) {
    delete shape;
    return nullptr;
  }
  return shape;
}

MC_API void minicache_stream_destroy(minicache::StreamShape* shape) { delete shape; }
