// PagedAttention as a TensorRT plugin: append, then attend over both tiers of the cache.
//
// Inputs, in the order of `input_names` (symbols as in minicache_trt/contract.py):
//   q [T, Hq D] · k, v [T, H D], keys after RoPE · kv [Nf, 2, H, B, D]                              compute type
//   query_start [S + 1] · context_len [S] · compressed_len [S] · slot_mapping [T] ·
//   full_table [S, Mf] · compressed_table [S, Mc] · decode_rows [Nd] · prefill_rows [Sp, Qm]        int32
//   full_work, compressed_work, prefill_past: not read here                                         int32
//   key.<pool>, value.<pool>: the layer's streams in the compressed tier, [Nc, ...]                 as contract.py
//   key.read.<map>, value.read.<map>: their linear maps (float32; head orders int64), ReadMaps in layout.cuh
// Outputs: out [T, Hq D], and kv, aliased. Inputs of the compressed tier are there if the node has streams.
//
// The counts of a step are extents: Nd of decode_rows, Sp and an upper bound Qm of the chunks of prefill_rows.
#pragma once

#include "tensorrt/attributes.h"
#include "tensorrt/plugin.h"

namespace minicache::trt {

class PagedAttention final : public CachePlugin {
 public:
  static constexpr const char* kName = "PagedAttention";

  // Null with a message if the fields describe no node.
  static std::unique_ptr<PagedAttention> make(const nvinfer1::PluginFieldCollection* fields,
                                              nvinfer1::TensorRTPhase phase, Error& error);
  PagedAttention(const AttentionAttributes& attributes, const Bindings& inputs, nvinfer1::TensorRTPhase phase);

 private:
  // Where an input is among the node's; -1 for those it does not have.
  struct StreamPlaces {
    std::int32_t latent, codes, params, norms, residual, residual_params, exact, exact_params, retained_index;
    std::int32_t map, residual_map, offset, slots;
  };
  struct Places {
    std::int32_t q, k, v, kv, query_start, context_len, compressed_len, slot_mapping, full_table, compressed_table,
        decode_rows, prefill_rows;
    StreamPlaces key, value;
  };

  std::unique_ptr<CachePlugin> copy() const override;
  std::int64_t workspace_bytes(const Shapes& shapes, Type type) const override;
  std::int32_t launch(const Call& call) const override;

  StreamPlaces places_of(const std::string& prefix) const;
  StreamView view(const StreamShape& shape, const StreamPlaces& places, const void* const* inputs,
                  const Shapes& shapes) const;
  // `inputs` null: sizes are asked for, and pointers stand for tensors that are there.
  AttentionArguments arguments(const Shapes& shapes, Type type, const void* const* inputs) const;

  AttentionAttributes attributes_;
  Places at_;
};

}  // namespace minicache::trt
