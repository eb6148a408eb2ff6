// What the nodes of the two custom ops say about themselves, parsed and validated once.
//
// PagedAttention                                                            CompressBlocks
//   num_heads            int   query heads Hq                                 num_kv_heads         int
//   num_kv_heads         int   KV heads H, a divisor of Hq                    head_dim             int
//   head_dim             int   D: 64, 80, 96, 128 or 256                      stream               text
//   sliding_window       int   tokens a query sees; 0: all                    stream_numbers       text, t and gamma
//   logit_numbers        text  scale and soft cap (0: none) of logits; may    inverse_frequencies  text
//                              be absent: 1 / sqrt(D) and none                input_names          text
//   input_names          text  what each input is, in order
//   key_stream           text  only with a compressed tier
//   value_stream         text  likewise
//   inverse_frequencies  text  likewise: D / 2 numbers of the rotary embedding
//
// Streams are described by the integers of minicache/descriptor.h. Texts are numbers or words separated by spaces.
// minicache_trt/model/attributes.py writes all of them into the ONNX nodes.
#pragma once

#include "tensorrt/fields.h"

namespace minicache::trt {

struct AttentionAttributes {
  std::int32_t query_heads, heads, dim, sliding_window;
  float scale, softcap;
  std::vector<std::string> inputs;
  bool compressed;                         // whether there are streams
  StreamShape key, value;
  std::vector<float> inverse_frequencies;  // empty without a compressed tier

  static const std::vector<FieldName>& names();
  // False with a message if the fields describe no node.
  static bool parse(const nvinfer1::PluginFieldCollection* fields, AttentionAttributes& out, Error& error);
  // Fields `parse` makes the same attributes of, pointing into them.
  void write(FieldList& out) const;

 private:
  std::string input_names_, logit_text_, key_text_, value_text_, frequencies_text_;
};

struct CompressAttributes {
  std::int32_t heads, dim;
  std::vector<std::string> inputs;
  StreamShape stream;
  std::vector<float> inverse_frequencies;

  static const std::vector<FieldName>& names();
  static bool parse(const nvinfer1::PluginFieldCollection* fields, CompressAttributes& out, Error& error);
  void write(FieldList& out) const;

 private:
  std::string input_names_, stream_text_, numbers_text_, frequencies_text_;
};

}  // namespace minicache::trt
