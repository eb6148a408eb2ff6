#include "tensorrt/plugin.h"

#include <exception>

#include "tensorrt/logging.h"

namespace minicache::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using Severity = nvinfer1::ILogger::Severity;

// Compute types of the kernels this library was built with.
bool compute_type(DataType type, Type& out) {
  switch (type) {
    case DataType::kHALF:
      out = Type::float16;
      return true;
#if !defined(MINICACHE_REDUCED)
    case DataType::kBF16:
      out = Type::bfloat16;
      return true;
#endif
#if defined(MINICACHE_HOST_BUILD)
    case DataType::kFLOAT:
      out = Type::float32;
      return true;
#endif
    default:
      return false;
  }
}

DataType fixed_type(Element element) {
  switch (element) {
    case Element::float16:
      return DataType::kHALF;
    case Element::int8:
      return DataType::kINT8;
    case Element::int32:
      return DataType::kINT32;
    case Element::int64:
      return DataType::kINT64;
    default:
      return DataType::kFLOAT;
  }
}

std::size_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kINT8:
      return 1;
    case DataType::kHALF:
    case DataType::kBF16:
      return 2;
    default:
      return 4;
  }
}

}  // namespace

CachePlugin::CachePlugin(const char* name, nvinfer1::TensorRTPhase phase, Bindings inputs, std::vector<Output> outputs,
                         std::vector<float> table)
    : name_(name), phase_(phase), inputs_(std::move(inputs)), outputs_(std::move(outputs)), table_(std::move(table)) {}

// 0 if `function(error)` succeeds; otherwise its message is reported.
template <class Function>
std::int32_t CachePlugin::guarded(Function function) const noexcept {
  try {
    Error error;
    if (function(error)) return 0;
    report(Severity::kERROR, error.message);
  } catch (const std::exception& exception) {
    report(Severity::kERROR, exception.what());
  }
  return 1;
}

void CachePlugin::describe() {
  const nvinfer1::PluginFieldCollection& fields = *fields_.collection();
  metadata_ = name_;
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    const nvinfer1::PluginField& field = fields.fields[i];
    const bool text = field.type == nvinfer1::PluginFieldType::kCHAR;
    metadata_ += std::string("; ") + field.name + ": ";
    metadata_ += text ? std::string(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length))
                      : std::to_string(*static_cast<const std::int32_t*>(field.data));
  }
}

nvinfer1::IPluginCapability* CachePlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* CachePlugin::clone() noexcept {
  std::unique_ptr<CachePlugin> result;
  guarded([&](Error&) { return (result = copy()) != nullptr; });
  return result.release();
}

nvinfer1::IPluginV3* CachePlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  std::unique_ptr<CachePlugin> result;
  const std::int32_t status = guarded([&](Error& error) {
    result = copy();
    return result->table_.upload(name_, error);
  });
  return status == 0 ? result.release() : nullptr;
}

bool CachePlugin::counts(std::int32_t input_count, std::int32_t output_count, Error& error) const {
  if (input_count == inputs_.size() && output_count == getNbOutputs()) return true;
  return error("%s: expected %d inputs (input_names) and %d outputs, got %d and %d", name_, inputs_.size(),
               getNbOutputs(), input_count, output_count);
}

std::int32_t CachePlugin::getOutputDataTypes(DataType* outputs, std::int32_t output_count, const DataType* inputs,
                                             std::int32_t input_count) const noexcept {
  return guarded([&](Error& error) {
    if (!counts(input_count, output_count, error)) return false;
    for (std::size_t i = 0; i < outputs_.size(); ++i) outputs[i] = inputs[outputs_[i].like];
    return true;
  });
}

std::int32_t CachePlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                                          const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* outputs,
                                          std::int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  return guarded([&](Error& error) {
    if (!counts(input_count, output_count, error)) return false;
    for (std::size_t i = 0; i < outputs_.size(); ++i) outputs[i] = inputs[outputs_[i].like];
    return true;
  });
}

bool CachePlugin::supportsFormatCombination(std::int32_t place, const DynamicPluginTensorDesc* tensors,
                                            std::int32_t input_count, std::int32_t output_count) noexcept {
  if (input_count != inputs_.size() || output_count != getNbOutputs()) return false;
  const PluginTensorDesc& own = tensors[place].desc;
  if (own.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (place >= input_count) {
    const Output& output = outputs_[static_cast<std::size_t>(place - input_count)];
    return own.type == tensors[output.like].desc.type;
  }
  if (inputs_[place].element != Element::model) return own.type == fixed_type(inputs_[place].element);
  Type type{};
  const int first = inputs_.model_place();
  return place == first ? compute_type(own.type, type) : own.type == tensors[first].desc.type;
}

std::int32_t CachePlugin::getAliasedInput(std::int32_t output) noexcept {
  if (output < 0 || output >= getNbOutputs()) return -1;
  const Output& own = outputs_[static_cast<std::size_t>(output)];
  return own.aliased ? own.like : -1;
}

std::int32_t CachePlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                          const DynamicPluginTensorDesc*, std::int32_t output_count) noexcept {
  return guarded([&](Error& error) {
    Type type{};
    const Shapes largest = Shapes::largest(inputs);
    if (!counts(input_count, output_count, error) || !inputs_.check(name_, largest, false, error)) return false;
    const DataType given = inputs[inputs_.model_place()].desc.type;
    if (!compute_type(given, type)) {
      return error("%s: %s: type %d is not one this library computes in", name_,
                   inputs_[inputs_.model_place()].name.c_str(), static_cast<int>(given));
    }
    return workspace_bytes(largest, type) >= 0 || error("%s: %s", name_, minicache_last_error());
  });
}

std::size_t CachePlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                          const DynamicPluginTensorDesc*, std::int32_t output_count) const noexcept {
  std::int64_t result = 0;
  guarded([&](Error& error) {
    Type type{};
    if (!counts(input_count, output_count, error)) return false;
    if (!compute_type(inputs[inputs_.model_place()].desc.type, type)) return true;  // refused elsewhere
    result = workspace_bytes(Shapes::largest(inputs), type);
    return result >= 0 || error("%s: %s", name_, minicache_last_error());
  });
  return result > 0 ? static_cast<std::size_t>(result) : 0;
}

std::int32_t CachePlugin::onShapeChange(const PluginTensorDesc* inputs, std::int32_t input_count,
                                        const PluginTensorDesc*, std::int32_t output_count) noexcept {
  return guarded([&](Error& error) {
    return counts(input_count, output_count, error) && inputs_.check(name_, Shapes::of(inputs), !building(), error) &&
           table_.upload(name_, error);
  });
}

std::int32_t CachePlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                                  const void* const* inputs, void* const* outputs, void* workspace,
                                  cudaStream_t stream) noexcept {
  return guarded([&](Error& error) {
    return enqueue_checked(input_descs, inputs, outputs, workspace, stream, error);
  });
}

bool CachePlugin::enqueue_checked(const PluginTensorDesc* descs, const void* const* inputs, void* const* outputs,
                                  void* workspace, cudaStream_t stream, Error& error) {
  Type type{};
  if (building()) {
    warn(said_building_, "an engine is being built, and nothing is computed: serialize it, and deserialize it to run");
    return true;
  }
  if (!compute_type(descs[inputs_.model_place()].type, type))
    return error("%s: the compute type is not one this library has", name_);
  if (!table_.ready()) return error("%s: enqueued before onShapeChange", name_);
  if (!copy_pools(descs, inputs, outputs, stream, error)) return false;
  const Call call{Shapes::of(descs), type, inputs, outputs, workspace, stream};
  return launch(call) == ok || error("%s: %s", name_, minicache_last_error());
}

void CachePlugin::warn(bool& said, const std::string& message) const {
  if (!said) report(Severity::kWARNING, (std::string(name_) + ": " + message).c_str());
  said = true;
}

bool CachePlugin::copy_pools(const PluginTensorDesc* descs, const void* const* inputs, void* const* outputs,
                             cudaStream_t stream, Error& error) {
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    const std::int32_t like = outputs_[i].like;
    if (!outputs_[i].aliased || outputs[i] == inputs[like]) continue;
    warn(said_copied_, inputs_[like].name +
                           " is copied in every step: build engines with the preview feature ALIASED_PLUGIN_IO_10_03");
    std::size_t bytes = bytes_of(descs[like].type);
    for (std::int32_t axis = 0; axis < descs[like].dims.nbDims; ++axis)
      bytes *= static_cast<std::size_t>(descs[like].dims.d[axis]);
    const cudaError_t status = cudaMemcpyAsync(outputs[i], inputs[like], bytes, cudaMemcpyDeviceToDevice, stream);
    if (status != cudaSuccess) return error("%s: %s", name_, cudaGetErrorString(status));
  }
  return true;
}

}  // namespace minicache::trt
