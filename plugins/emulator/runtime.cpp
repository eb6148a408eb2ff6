// The CUDA runtime on a CPU: kernels run as the PTX that nvcc made of them, when they are launched, to their end.
// Memory is the host's. Only what the kernels' launchers and the plugins call is here.
#include "runtime.h"

#include <cuda_runtime_api.h>
#include <fatbinary_section.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "decode.h"

namespace emulator {
namespace {

constexpr std::int64_t kSharedDefault = 48 * 1024;

// The PTX of a module, taken apart so that a kernel is parsed when it is first launched.
struct Module {
  std::string declarations;
  std::map<std::string, std::string> kernels;
};

struct Kernel {
  const Module* module = nullptr;
  std::string name;
  std::int64_t shared_limit = kSharedDefault;
  ModuleText text;
  std::vector<std::unique_ptr<std::vector<std::uint64_t>>> memory;  // of global variables
  std::unique_ptr<Program> program;
  Statistics statistics;
};

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};

struct Runtime {
  std::mutex mutex;  // kernels run one at a time
  std::vector<std::unique_ptr<Module>> modules;
  std::map<const void*, Kernel> kernels;  // by the host function that launches it
  std::vector<Kernel*> launched;          // since statistics were reset, in order of first launches
  Allowed allowed;
  std::map<const char*, std::size_t> allocations;
  bool reverse = false;
  // Thread blocks run one after another; shared memory is that of Hopper.
  std::int32_t processors = 1, shared_of_block = 227 * 1024, shared_of_processor = 228 * 1024;
  std::string answer;
};

Runtime& runtime() {
  static Runtime own;
  return own;
}

thread_local std::vector<Configuration> configurations;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_fault;

cudaError_t failed(cudaError_t error) { return last_error = error; }

// The text of a fat binary's PTX. Its header says where entries begin, each entry's where its text does.
std::string ptx_of(const void* data) {
  struct Header {
    std::uint32_t magic;
    std::uint16_t version, bytes;
    std::uint64_t size;
  } header;
  struct Entry {
    std::uint16_t kind, version;
    std::uint32_t bytes;
    std::uint64_t size;
    std::uint32_t compressed_size;
  } entry;
  const char* at = static_cast<const char*>(data);
  std::memcpy(&header, at, sizeof(header));
  if (header.magic != 0xba55ed50u) throw UnsupportedPtx("a fat binary of an unknown format");
  at += header.bytes;
  for (const char* const end = at + header.size; at < end;) {
    std::memcpy(&entry, at, sizeof(entry));
    if (entry.kind == 1) {
      if (entry.compressed_size != 0) throw UnsupportedPtx("compressed PTX: compile with --compress-mode=none");
      return std::string(at + entry.bytes, strnlen(at + entry.bytes, entry.size));
    }
    at += entry.bytes + entry.size;
  }
  return {};
}

std::unique_ptr<Module> module_of(const std::string& ptx) {
  auto module = std::make_unique<Module>();
  std::size_t at = 0;
  for (std::size_t entry; (entry = ptx.find(".entry", at)) != std::string::npos;) {
    const std::size_t start = ptx.rfind('\n', entry) + 1;
    std::size_t end = ptx.find('{', entry);
    for (int depth = 0; end < ptx.size();) {
      depth += (ptx[end] == '{') - (ptx[end] == '}');
      ++end;
      if (depth == 0) break;
    }
    end = std::min(end, ptx.size());
    module->declarations += ptx.substr(at, start - at);
    const std::size_t name = ptx.find_first_not_of(" \t", entry + 6);
    module->kernels[ptx.substr(name, ptx.find_first_of("( \t\r\n", name) - name)] = ptx.substr(start, end - start);
    at = end;
  }
  module->declarations += ptx.substr(at);
  return module;
}

void prepare(Kernel& kernel) {
  if (kernel.program != nullptr) return;
  const auto found = kernel.module->kernels.find(kernel.name);
  if (found == kernel.module->kernels.end()) throw UnsupportedPtx(kernel.name + " is not in its module");
  kernel.text = parse(kernel.module->declarations + found->second);
  std::map<std::string, const char*> constants;
  for (const Variable& variable : kernel.text.constants) {
    kernel.memory.push_back(std::make_unique<std::vector<std::uint64_t>>((variable.bytes + 7) / 8));
    char* const base = reinterpret_cast<char*>(kernel.memory.back()->data());
    for (std::size_t n = 0; n < variable.values.size(); ++n)
      std::memcpy(base + n * variable.element, &variable.values[n], static_cast<std::size_t>(variable.element));
    constants[variable.name] = base;
  }
  kernel.program = decode(kernel.text.kernels.at(0), kernel.text, constants);
}

// Counts of instructions to counts of places.
void add_up(Kernel& kernel) {
  if (kernel.program == nullptr) return;
  for (std::size_t n = 0; n < kernel.program->executed.size(); ++n) {
    std::int64_t& count = kernel.program->executed[n];
    if (count > 0) kernel.statistics.places[kernel.program->instructions[n].statement->place] += count;
    count = 0;
  }
}

Allowed allowed_now(const Runtime& state, const Kernel& kernel) {
  Allowed result = state.allowed;
  if (result.ranges.empty()) return result;
  for (const auto& [base, bytes] : state.allocations) result.add(base, bytes);
  for (const auto& words : kernel.memory) result.add(reinterpret_cast<const char*>(words->data()), words->size() * 8);
  return result;
}

void run(Runtime& state, Kernel& kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared) {
  prepare(kernel);
  Program& program = *kernel.program;
  // A kernel here has one parameter, as its PTX does.
  std::size_t index = 0;
  std::int64_t at = 0;
  for (const Variable& parameter : kernel.text.kernels.at(0).parameters) {
    at = (at + parameter.align - 1) / parameter.align * parameter.align;
    std::memcpy(program.parameters.data() + at, arguments[index++], static_cast<std::size_t>(parameter.bytes));
    at += parameter.bytes;
  }
  const Allowed allowed = allowed_now(state, kernel);
  const Dimensions blocks{grid.x, grid.y, grid.z};
  Block machine(program, blocks, {block.x, block.y, block.z}, static_cast<std::int64_t>(shared), allowed,
                kernel.statistics);
  if (kernel.statistics.launches++ == 0) state.launched.push_back(&kernel);
  kernel.statistics.shared_bytes =
      std::max(kernel.statistics.shared_bytes, program.shared_bytes + static_cast<std::int64_t>(shared));
  for (std::int64_t n = 0; n < blocks.count(); ++n) {
    const std::int64_t place = state.reverse ? blocks.count() - 1 - n : n;
    machine.run({static_cast<unsigned>(place % grid.x), static_cast<unsigned>(place / grid.x % grid.y),
                 static_cast<unsigned>(place / grid.x / grid.y)});
  }
}

cudaError_t launch(Kernel* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared) {
  if (kernel == nullptr) return failed(cudaErrorInvalidDeviceFunction);
  const std::uint64_t threads = static_cast<std::uint64_t>(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535)
    return failed(cudaErrorInvalidConfiguration);
  if (static_cast<std::int64_t>(shared) > kernel->shared_limit) return failed(cudaErrorInvalidValue);
  Runtime& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  try {
    run(state, *kernel, grid, block, arguments, shared);
  } catch (const std::exception& error) {
    last_fault = error.what();
    return failed(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

Kernel* kernel_of(const void* function) {
  Runtime& state = runtime();
  const auto found = state.kernels.find(function);
  return found == state.kernels.end() ? nullptr : &found->second;
}

}  // namespace
}  // namespace emulator

using emulator::failed;
using emulator::runtime;

// ---- what nvcc's host code calls ----

extern "C" {

void** __cudaRegisterFatBinary(void* binary) {
  auto& state = runtime();
  const auto* const wrapper = static_cast<const __fatBinC_Wrapper_t*>(binary);
  try {
    state.modules.push_back(emulator::module_of(emulator::ptx_of(wrapper->data)));
  } catch (const std::exception& error) {  // its kernels will not be found
    emulator::last_fault = error.what();
    state.modules.push_back(std::make_unique<emulator::Module>());
  }
  return reinterpret_cast<void**>(state.modules.back().get());
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  emulator::Kernel& kernel = runtime().kernels[host];
  kernel.module = reinterpret_cast<const emulator::Module*>(module);
  kernel.name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream) {
  emulator::configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  if (emulator::configurations.empty()) return failed(cudaErrorMissingConfiguration);
  const emulator::Configuration last = emulator::configurations.back();
  emulator::configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(emulator::kernel_of(function));
  return *kernel == nullptr ? failed(cudaErrorInvalidDeviceFunction) : cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                               cudaStream_t) {
  return emulator::launch(reinterpret_cast<emulator::Kernel*>(kernel), grid, block, arguments, shared);
}

}  // extern "C"

// ---- the public runtime ----

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                             cudaStream_t) {
  return emulator::launch(emulator::kernel_of(function), grid, block, arguments, shared);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  emulator::Kernel* const kernel = emulator::kernel_of(function);
  if (kernel == nullptr) return failed(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > runtime().shared_of_block)
    return failed(cudaErrorInvalidValue);
  kernel->shared_limit = value;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = runtime().shared_of_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = runtime().shared_of_processor;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = runtime().processors;
      return cudaSuccess;
    default:
      return failed(cudaErrorInvalidValue);
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return emulator::last_fault.c_str();
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    default:
      return "an error of the emulated CUDA runtime";
  }
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return failed(cudaErrorMemoryAllocation);
  auto& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.allocations[static_cast<const char*>(*memory)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  auto& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.allocations.erase(static_cast<const char*>(memory));
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// ---- for tests ----

void emulator_allow(const void* base, std::size_t bytes) {
  auto& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.allowed.add(static_cast<const char*>(base), bytes);
}

void emulator_allow_all() {
  auto& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.allowed.ranges.clear();
}

void emulator_reverse(std::int32_t reverse) { runtime().reverse = reverse != 0; }

std::int32_t emulator_last_error() { return emulator::last_error; }

void emulator_exchange_device(std::int32_t* numbers) {
  auto& state = runtime();
  std::swap(state.processors, numbers[0]);
  std::swap(state.shared_of_block, numbers[1]);
  std::swap(state.shared_of_processor, numbers[2]);
}

const char* emulator_statistics() {
  auto& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.answer = "{";
  for (emulator::Kernel* kernel : state.launched) {
    emulator::add_up(*kernel);
    if (state.answer.size() > 1) state.answer += ", ";
    state.answer += "\"" + kernel->name + "\": " + kernel->statistics.json();
  }
  state.answer += "}";
  return state.answer.c_str();
}

void emulator_reset_statistics() {
  auto& state = runtime();
  const std::lock_guard<std::mutex> lock(state.mutex);
  for (auto& [function, kernel] : state.kernels) {
    emulator::add_up(kernel);
    kernel.statistics = {};
  }
  state.launched.clear();
}
