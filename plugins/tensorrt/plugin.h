// What the plugins share: TensorRT's interfaces around a table of inputs and outputs.
//
//   build     configurePlugin checks types and largest extents; outputs are as long as the inputs they are like, and
//             pools are aliased to theirs (getAliasedInput), so that a step writes into the cache it was given
//   runtime   attachToContext clones and puts constants on the device; onShapeChange checks extents; enqueue launches
//
// While an engine is built, TensorRT may enqueue plugins to time them. What tables of blocks hold then is anything, and
// kernels go where tables send them: plugins made for the build phase launch nothing, and say so.
//
// enqueue neither allocates nor waits, so it may be captured in a CUDA graph. Errors go to the logger, and a code other
// than 0 to TensorRT.
#pragma once

#include <memory>

#include "api.h"
#include "tensorrt/bindings.h"
#include "tensorrt/device_table.h"
#include "tensorrt/fields.h"

namespace minicache::trt {

constexpr const char* kNamespace = "minicache";
constexpr const char* kVersion = "1";

class CachePlugin : public nvinfer1::IPluginV3,
                    public nvinfer1::IPluginV3OneCore,
                    public nvinfer1::IPluginV3OneBuildV2,
                    public nvinfer1::IPluginV3OneRuntime {
 public:
  CachePlugin(const CachePlugin&) = delete;
  CachePlugin& operator=(const CachePlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(outputs_.size()); }
  std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t output_count,
                                  const nvinfer1::DataType* inputs, std::int32_t input_count) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                               nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t place, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t input_count, std::int32_t output_count) noexcept override;
  std::int32_t getAliasedInput(std::int32_t output) noexcept override;
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t output_count) noexcept override;
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t output_count) const noexcept override;
  const char* getMetadataString() noexcept override { return metadata_.c_str(); }

  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                             const nvinfer1::PluginTensorDesc* outputs, std::int32_t output_count) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.collection(); }

 protected:
  // An output has the type and the extents of an input; an aliased one is that input, changed in place.
  struct Output {
    std::int32_t like;
    bool aliased;
  };

  // One launch.
  struct Call {
    Shapes shapes;
    Type type;
    const void* const* inputs;
    void* const* outputs;
    void* workspace;
    cudaStream_t stream;
  };

  // `table`: numbers `launch` finds on the device.
  CachePlugin(const char* name, nvinfer1::TensorRTPhase phase, Bindings inputs, std::vector<Output> outputs,
              std::vector<float> table);
  // What an engine keeps. Called once by constructors, when the attributes lie where they stay.
  template <class Attributes>
  void keep(const Attributes& attributes) {
    attributes.write(fields_);
    describe();
  }

  virtual std::unique_ptr<CachePlugin> copy() const = 0;
  // Bytes for these extents, and enough for any smaller ones; -1 with minicache_last_error() for what kernels refuse.
  virtual std::int64_t workspace_bytes(const Shapes& shapes, Type type) const = 0;
  // A Status, with minicache_last_error().
  virtual std::int32_t launch(const Call& call) const = 0;

  const Bindings& inputs() const { return inputs_; }
  nvinfer1::TensorRTPhase phase() const { return phase_; }
  const float* table() const { return table_.data(); }

 private:
  bool counts(std::int32_t input_count, std::int32_t output_count, Error& error) const;
  bool enqueue_checked(const nvinfer1::PluginTensorDesc* descs, const void* const* inputs, void* const* outputs,
                       void* workspace, cudaStream_t stream, Error& error);
  // Pools TensorRT did not alias: copied, so that results are right all the same.
  bool copy_pools(const nvinfer1::PluginTensorDesc* descs, const void* const* inputs, void* const* outputs,
                  cudaStream_t stream, Error& error);
  void describe();
  template <class Function>
  std::int32_t guarded(Function function) const noexcept;

  bool building() const { return phase_ == nvinfer1::TensorRTPhase::kBUILD; }
  // A warning, the first time.
  void warn(bool& said, const std::string& message) const;

  const char* name_;
  nvinfer1::TensorRTPhase phase_;
  Bindings inputs_;
  std::vector<Output> outputs_;
  DeviceTable table_;
  FieldList fields_;
  std::string metadata_;
  bool said_copied_ = false, said_building_ = false;
};

}  // namespace minicache::trt
