// What ONNX Runtime calls when it loads the library.
#include <cstdlib>
#include <exception>
#include <new>

#include "onnxruntime/operator.h"

namespace minicache::ort {
namespace {

Status* create(const CustomOp*, const void* const* table, const KernelInfo* info, void** out) {
  const Api api{table};
  Attributes attributes;
  Error error;
  try {
    if (!read_attributes(api, info, attributes, error)) return api.create_status(kFail, error.message);
    *out = new PagedAttention(api, std::move(attributes));
  } catch (const std::exception& problem) {
    return api.create_status(kFail, problem.what());
  }
  return nullptr;
}

const Api*& shared_api() {
  static const Api* api = nullptr;
  return api;
}

Status* compute(void* kernel, KernelContext* context) {
  try {
    return static_cast<PagedAttention*>(kernel)->compute(context);
  } catch (const std::exception& problem) {
    return shared_api()->create_status(kFail, problem.what());
  }
}

// One variadic input and one variadic output: which tensors a node has depends on its streams.
const CustomOp& paged_attention() {
  static const CustomOp op = [] {
    CustomOp result{};
    result.name = [](const CustomOp*) { return "PagedAttention"; };
    result.provider = [](const CustomOp*) -> const char* { return nullptr; };
    result.input_type = [](const CustomOp*, std::size_t) { return Element::undefined; };
    result.inputs = [](const CustomOp*) -> std::size_t { return 1; };
    result.output_type = [](const CustomOp*, std::size_t) { return Element::float32; };
    result.outputs = [](const CustomOp*) -> std::size_t { return 1; };
    result.destroy_kernel = [](void* kernel) { delete static_cast<PagedAttention*>(kernel); };
    result.input_characteristic = [](const CustomOp*, std::size_t) { return Characteristic::variadic; };
    result.output_characteristic = [](const CustomOp*, std::size_t) { return Characteristic::variadic; };
    result.input_memory = [](const CustomOp*, std::size_t) { return 0; };
    result.variadic_inputs = [](const CustomOp*) { return 1; };
    result.variadic_inputs_alike = [](const CustomOp*) { return 0; };
    result.variadic_outputs = [](const CustomOp*) { return 2; };
    result.variadic_outputs_alike = [](const CustomOp*) { return 1; };
    result.create_kernel_checked = create;
    result.compute_checked = compute;
    return result;
  }();
  return op;
}

}  // namespace
}  // namespace minicache::ort

extern "C" __attribute__((visibility("default"))) minicache::ort::Status* RegisterCustomOps(
    minicache::ort::SessionOptions* options, const minicache::ort::ApiBase* base) {
  using namespace minicache::ort;
  const void* const* table = base->get_api(kApiVersion);
  if (table == nullptr) return nullptr;  // an older runtime: its sessions will say that the operator is unknown
  static const Api api{table};
  shared_api() = &api;
  CustomOpDomain* domain = nullptr;  // lives as long as the process, as sessions need it
  if (Status* status = api.create_domain("minicache", &domain)) return status;
  if (Status* status = api.add_op(domain, &paged_attention())) return status;
  return api.add_domain(options, domain);
}

// Name of the instruction set the kernels use here.
extern "C" __attribute__((visibility("default"))) const char* minicache_cpu_isa() {
  return minicache::cpu::kernels(std::getenv("MINICACHE_CPU_ISA")).name;
}
