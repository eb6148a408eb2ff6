// CompressBlocks as a TensorRT plugin: blocks of the full tier into one stream's blocks of the compressed tier.
//
// Inputs, in the order of `input_names` (symbols as in minicache_trt/contract.py):
//   source_blocks, target_blocks, block_index [N]                                     int32
//   kv0, kv1, ... [Nf, 2, H, B, D]: full pools of the stream's layers                 compute type
//   transform, align, encode, bias, map.<i>, offset.<i>: linear maps (WriteMaps)      float32
//   heads: KV head of each slot                                                       int64
//   the stream's pools [Nc, ...]                                                      as contract.py
// Outputs: the pools, in their order among the inputs, each aliased to its own. A transform is not read: it is made of
// butterflies here.
#pragma once

#include "tensorrt/attributes.h"
#include "tensorrt/plugin.h"

namespace minicache::trt {

class CompressBlocks final : public CachePlugin {
 public:
  static constexpr const char* kName = "CompressBlocks";

  // Null with a message if the fields describe no node.
  static std::unique_ptr<CompressBlocks> make(const nvinfer1::PluginFieldCollection* fields,
                                              nvinfer1::TensorRTPhase phase, Error& error);
  CompressBlocks(const CompressAttributes& attributes, const Bindings& inputs, nvinfer1::TensorRTPhase phase);

 private:
  // Where an input is among the node's, or a pool among its outputs; -1 for those it does not have.
  struct Places {
    std::int32_t source_blocks, target_blocks, block_index, kv[kMaxGroup];
    std::int32_t align, encode, bias, heads, map[kMaxGroup], offset[kMaxGroup];
    std::int32_t latent, codes, params, norms, residual, residual_params, exact, exact_params, retained_index;
  };

  static std::vector<Output> pools_of(const Bindings& inputs);
  std::unique_ptr<CachePlugin> copy() const override;
  std::int64_t workspace_bytes(const Shapes& shapes, Type type) const override;
  std::int32_t launch(const Call& call) const override;

  CompressAttributes attributes_;
  Places at_;
};

}  // namespace minicache::trt
