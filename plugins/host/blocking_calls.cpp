// The CUDA runtime of the host variant, which counts the calls that may not come while a CUDA graph is captured.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

std::atomic<std::int32_t> blocking{0};

}  // namespace

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  ++blocking;
  *memory = std::malloc(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  ++blocking;
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  ++blocking;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// Calls so far that allocate or wait.
extern "C" __attribute__((visibility("default"))) std::int32_t minicache_blocking_calls() { return blocking; }
