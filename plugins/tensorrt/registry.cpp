// What the library shows TensorRT: the creators of both plugins, and where to put messages.
#include "tensorrt/compress_blocks.h"
#include "tensorrt/logging.h"
#include "tensorrt/paged_attention.h"

#include <exception>

namespace minicache::trt {
namespace {

using Severity = nvinfer1::ILogger::Severity;

template <class Plugin, class Attributes>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (const FieldName& field : Attributes::names()) fields_.emplace_back(field.name, nullptr, field.type, 1);
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      Error error;
      std::unique_ptr<Plugin> plugin = Plugin::make(fields, phase, error);
      if (plugin == nullptr) report(Severity::kERROR, error.message);
      return plugin.release();
    } catch (const std::exception& exception) {
      report(Severity::kERROR, exception.what());
      return nullptr;
    }
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Plugin::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace minicache::trt

MC_API nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  using namespace minicache::trt;
  static Creator<PagedAttention, AttentionAttributes> attention;
  static Creator<CompressBlocks, CompressAttributes> compression;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention, &compression};
  count = 2;
  return creators;
}

MC_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { minicache::trt::set_logger_finder(finder); }
