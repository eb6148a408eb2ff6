// Drives the plugins of a library as TensorRT does, through their own interfaces, for tests without TensorRT: creates
// them from fields, asks for formats, shapes and workspace, and runs them on buffers given as pointers.
//
// C ABI for ctypes. Functions that return an int return the plugin's code, 0 for success.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <string>
#include <vector>

#define HARNESS_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;

// Collects what plugins say.
class Logger final : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    messages += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
  std::string messages;
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
  Logger logger;
};

Finder& finder() {
  static Finder own;
  return own;
}

class ResourceContext final : public IPluginResourceContext {
 public:
  IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// Plugins here copy extents of inputs and build no expressions.
class NoExpressions final : public IExprBuilder {
 public:
  ~NoExpressions() noexcept override = default;
};

template <class Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuildV2* build(IPluginV3* plugin) {
  return capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

// A tensor of a call, as tests describe it.
struct Tensor {
  std::int32_t type, format, rank;
  std::int64_t extents[8];
  void* data;
};

// A field, as tests describe it.
struct Field {
  const char* name;
  const void* data;
  std::int32_t type, length;
};

PluginTensorDesc describe(const Tensor& tensor) {
  PluginTensorDesc result{};
  result.dims.nbDims = tensor.rank;
  for (int axis = 0; axis < tensor.rank; ++axis) result.dims.d[axis] = tensor.extents[axis];
  result.type = static_cast<DataType>(tensor.type);
  result.format = static_cast<TensorFormat>(tensor.format);
  result.scale = 1.0f;
  return result;
}

// Extents are the bounds; the declared ones are unknown, as those of dynamic shapes.
DynamicPluginTensorDesc dynamic(const Tensor& tensor) {
  DynamicPluginTensorDesc result{};
  result.desc = describe(tensor);
  result.min = result.max = result.opt = result.desc.dims;
  for (int axis = 0; axis < tensor.rank; ++axis) {
    result.min.d[axis] = 0;
    result.desc.dims.d[axis] = -1;
  }
  return result;
}

template <class Result, class Function>
std::vector<Result> mapped(const Tensor* tensors, int count, Function function) {
  std::vector<Result> result;
  for (int i = 0; i < count; ++i) result.push_back(function(tensors[i]));
  return result;
}
std::vector<PluginTensorDesc> descs_of(const Tensor* tensors, int count) {
  return mapped<PluginTensorDesc>(tensors, count, describe);
}
std::vector<DynamicPluginTensorDesc> dynamic_of(const Tensor* tensors, int count) {
  return mapped<DynamicPluginTensorDesc>(tensors, count, dynamic);
}

using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
using SetLoggerFinder = void (*)(ILoggerFinder*);

}  // namespace

// Creators of a library; null if it cannot be loaded or is no plugin library. It stays loaded.
HARNESS_API IPluginCreatorInterface* const* harness_open(const char* path, std::int32_t* count) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    finder().logger.messages += std::string("0 ") + dlerror() + "\n";
    return nullptr;
  }
  const auto creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  const auto set_finder = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
  if (creators == nullptr || set_finder == nullptr) return nullptr;
  set_finder(&finder());
  return creators(*count);
}

// Everything that was logged since the last call, a line each: severity, message.
HARNESS_API const char* harness_messages() {
  static std::string taken;
  taken.clear();
  taken.swap(finder().logger.messages);
  return taken.c_str();
}

HARNESS_API const char* harness_creator_name(IPluginCreatorInterface* creator) {
  static std::string name;
  auto* const own = static_cast<IPluginCreatorV3One*>(creator);
  name = std::string(own->getPluginNamespace()) + "::" + own->getPluginName() + "::" + own->getPluginVersion();
  return name.c_str();
}

HARNESS_API IPluginV3* harness_create(IPluginCreatorInterface* creator, const Field* fields, std::int32_t count,
                                      std::int32_t phase) {
  std::vector<PluginField> own;
  for (int i = 0; i < count; ++i)
    own.emplace_back(fields[i].name, fields[i].data, static_cast<PluginFieldType>(fields[i].type), fields[i].length);
  const PluginFieldCollection collection{count, own.data()};
  return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("", &collection, static_cast<TensorRTPhase>(phase));
}

HARNESS_API void harness_destroy(IPluginV3* plugin) { delete plugin; }
HARNESS_API IPluginV3* harness_clone(IPluginV3* plugin) { return plugin->clone(); }
HARNESS_API IPluginV3* harness_attach(IPluginV3* plugin) {
  static ResourceContext context;
  return runtime(plugin)->attachToContext(&context);
}

HARNESS_API const char* harness_plugin_name(IPluginV3* plugin) {
  static std::string name;
  auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  name = std::string(core->getPluginNamespace()) + "::" + core->getPluginName() + "::" + core->getPluginVersion();
  return name.c_str();
}

// The fields an engine would keep; false behind the last one.
HARNESS_API bool harness_field(IPluginV3* plugin, std::int32_t number, Field* out) {
  const PluginFieldCollection* fields = runtime(plugin)->getFieldsToSerialize();
  if (number >= fields->nbFields) return false;
  const PluginField& field = fields->fields[number];
  *out = {field.name, field.data, static_cast<std::int32_t>(field.type), field.length};
  return true;
}

HARNESS_API std::int32_t harness_outputs(IPluginV3* plugin) { return build(plugin)->getNbOutputs(); }
HARNESS_API std::int32_t harness_aliased_input(IPluginV3* plugin, std::int32_t output) {
  return build(plugin)->getAliasedInput(output);
}

// Which input's extents each output has, -1 for others; types of outputs.
HARNESS_API std::int32_t harness_infer(IPluginV3* plugin, const Tensor* inputs, std::int32_t count,
                                       std::int32_t* shape_of, std::int32_t* types) {
  const int outputs = build(plugin)->getNbOutputs();
  std::vector<DimsExprs> shapes(static_cast<std::size_t>(count)), inferred(static_cast<std::size_t>(outputs));
  std::vector<DataType> given, found(static_cast<std::size_t>(outputs));
  for (int i = 0; i < count; ++i) {
    given.push_back(static_cast<DataType>(inputs[i].type));
    shapes[static_cast<std::size_t>(i)].nbDims = inputs[i].rank;
    for (int axis = 0; axis < inputs[i].rank; ++axis)  // an address that tells input and axis
      shapes[static_cast<std::size_t>(i)].d[axis] = reinterpret_cast<const IDimensionExpr*>(&inputs[i].extents[axis]);
  }
  NoExpressions none;
  std::int32_t status = build(plugin)->getOutputDataTypes(found.data(), outputs, given.data(), count);
  if (status == 0)
    status = build(plugin)->getOutputShapes(shapes.data(), count, nullptr, 0, inferred.data(), outputs, none);
  for (int output = 0; status == 0 && output < outputs; ++output) {
    const DimsExprs& own = inferred[static_cast<std::size_t>(output)];
    types[output] = static_cast<std::int32_t>(found[static_cast<std::size_t>(output)]);
    shape_of[output] = -1;
    for (int i = 0; i < count; ++i) {
      bool same = own.nbDims == inputs[i].rank;
      for (int axis = 0; same && axis < own.nbDims; ++axis)
        same = own.d[axis] == shapes[static_cast<std::size_t>(i)].d[axis];
      if (same) shape_of[output] = i;
    }
  }
  return status;
}

HARNESS_API bool harness_supports(IPluginV3* plugin, std::int32_t place, const Tensor* tensors, std::int32_t inputs,
                                  std::int32_t outputs) {
  const auto descs = dynamic_of(tensors, inputs + outputs);
  return build(plugin)->supportsFormatCombination(place, descs.data(), inputs, outputs);
}

// `inputs` with the largest extents.
HARNESS_API std::int32_t harness_configure(IPluginV3* plugin, const Tensor* inputs, std::int32_t count,
                                           const Tensor* outputs, std::int32_t output_count) {
  const auto in = dynamic_of(inputs, count), out = dynamic_of(outputs, output_count);
  return build(plugin)->configurePlugin(in.data(), count, out.data(), output_count);
}

HARNESS_API std::int64_t harness_workspace(IPluginV3* plugin, const Tensor* inputs, std::int32_t count,
                                           const Tensor* outputs, std::int32_t output_count) {
  const auto in = dynamic_of(inputs, count), out = dynamic_of(outputs, output_count);
  return static_cast<std::int64_t>(build(plugin)->getWorkspaceSize(in.data(), count, out.data(), output_count));
}

HARNESS_API std::int32_t harness_shape_change(IPluginV3* plugin, const Tensor* inputs, std::int32_t count,
                                              const Tensor* outputs, std::int32_t output_count) {
  const auto in = descs_of(inputs, count), out = descs_of(outputs, output_count);
  return runtime(plugin)->onShapeChange(in.data(), count, out.data(), output_count);
}

HARNESS_API std::int32_t harness_enqueue(IPluginV3* plugin, const Tensor* inputs, std::int32_t count,
                                         const Tensor* outputs, std::int32_t output_count, void* workspace,
                                         void* stream) {
  const auto in = descs_of(inputs, count), out = descs_of(outputs, output_count);
  const auto data = [](const Tensor& tensor) { return tensor.data; };
  const auto from = mapped<void*>(inputs, count, data), to = mapped<void*>(outputs, output_count, data);
  return runtime(plugin)->enqueue(in.data(), out.data(), from.data(), to.data(), workspace,
                                  static_cast<cudaStream_t>(stream));
}
