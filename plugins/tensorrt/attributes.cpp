#include "tensorrt/attributes.h"

#include <cmath>

namespace minicache::trt {
namespace {

constexpr const char* kAttention = "PagedAttention";
constexpr const char* kCompress = "CompressBlocks";
constexpr int kMostHeads = 1 << 15;
constexpr int kLargest = 2147483647;

using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

bool read_frequencies(const FieldReader& reader, const char* op, std::int32_t dim, std::string& text,
                      std::vector<float>& out, Error& error) {
  if (!reader.floats("inverse_frequencies", text, out)) return false;
  if (out.size() != static_cast<std::size_t>(dim / 2)) {
    return error("%s: inverse_frequencies: expected head_dim / 2 = %d numbers, got %d", op, dim / 2,
                 static_cast<int>(out.size()));
  }
  for (const float frequency : out) {
    if (!std::isfinite(frequency))
      return error("%s: inverse_frequencies: expected finite numbers, got %g", op, static_cast<double>(frequency));
  }
  return true;
}

// The description of a stream of `part` (whichever it is, if null).
bool read_stream(const FieldReader& reader, const char* op, const char* name, const Part* part,
                 const std::vector<float>& numbers, std::int32_t heads, std::int32_t dim, std::string& text,
                 StreamShape& out, Error& error) {
  std::vector<std::int32_t> integers;
  if (!reader.integers(name, text, integers)) return false;
  Error inner;
  if (!parse_stream(integers.data(), static_cast<int>(integers.size()), numbers.data(),
                    static_cast<int>(numbers.size()), heads, dim, out, inner)) {
    return error("%s: %s: %s", op, name, inner.message);
  }
  if (part != nullptr && out.part != *part) {
    return error("%s: %s: expected a stream of %s, got one of %s", op, name, *part == Part::key ? "keys" : "values",
                 out.part == Part::key ? "keys" : "values");
  }
  return true;
}

// Scale and soft cap of logits.
bool read_logit_numbers(const FieldReader& reader, AttentionAttributes& out, std::string& text, Error& error) {
  out.scale = 1.0f / std::sqrt(static_cast<float>(out.dim));
  out.softcap = 0.0f;
  if (!reader.has("logit_numbers")) return true;
  std::vector<float> numbers;
  if (!reader.floats("logit_numbers", text, numbers)) return false;
  if (numbers.size() != 2)
    return error("%s: logit_numbers: expected 2 numbers, got %d", kAttention, static_cast<int>(numbers.size()));
  out.scale = numbers[0];
  out.softcap = numbers[1];
  if (!std::isfinite(out.scale) || !(out.scale > 0.0f))
    return error("%s: logit_numbers: expected a positive scale, got %g", kAttention, static_cast<double>(out.scale));
  if (!std::isfinite(out.softcap) || !(out.softcap >= 0.0f)) {
    return error("%s: logit_numbers: expected a soft cap of at least 0, got %g", kAttention,
                 static_cast<double>(out.softcap));
  }
  return true;
}

bool read_input_names(const FieldReader& reader, std::string& text, std::vector<std::string>& out) {
  if (!reader.text("input_names", text)) return false;
  out = split_words(text);
  return true;
}

}  // namespace

const std::vector<FieldName>& AttentionAttributes::names() {
  static const std::vector<FieldName> names = {
      {"num_heads", PluginFieldType::kINT32},     {"num_kv_heads", PluginFieldType::kINT32},
      {"head_dim", PluginFieldType::kINT32},      {"sliding_window", PluginFieldType::kINT32},
      {"input_names", PluginFieldType::kCHAR},    {"key_stream", PluginFieldType::kCHAR},
      {"value_stream", PluginFieldType::kCHAR},   {"inverse_frequencies", PluginFieldType::kCHAR},
      {"logit_numbers", PluginFieldType::kCHAR},
  };
  return names;
}

bool AttentionAttributes::parse(const PluginFieldCollection* fields, AttentionAttributes& out, Error& error) {
  const FieldReader reader(kAttention, fields, error);
  if (!reader.only(names()) || !reader.number("num_kv_heads", 1, kMostHeads, out.heads) ||
      !reader.number("num_heads", 1, kMostHeads, out.query_heads) ||
      !reader.number("head_dim", 1, kMaxHeadDim, out.dim) ||
      !reader.number("sliding_window", 0, kLargest, out.sliding_window) ||
      !read_logit_numbers(reader, out, out.logit_text_, error) ||
      !read_input_names(reader, out.input_names_, out.inputs)) {
    return false;
  }
  if (out.query_heads % out.heads != 0) {
    return error("%s: num_heads: expected a multiple of num_kv_heads (%d), got %d", kAttention, out.heads,
                 out.query_heads);
  }
  if (out.dim != 64 && out.dim != 80 && out.dim != 96 && out.dim != 128 && out.dim != 256)
    return error("%s: head_dim: expected 64, 80, 96, 128 or 256, got %d", kAttention, out.dim);
  out.compressed = reader.has("key_stream") || reader.has("value_stream");
  if (!out.compressed) return true;
  const Part key = Part::key, value = Part::value;
  const std::vector<float> none = {0.0f, 0.0f};  // readers need neither t nor gamma
  return read_stream(reader, kAttention, "key_stream", &key, none, out.heads, out.dim, out.key_text_, out.key, error) &&
         read_stream(reader, kAttention, "value_stream", &value, none, out.heads, out.dim, out.value_text_, out.value,
                     error) &&
         read_frequencies(reader, kAttention, out.dim, out.frequencies_text_, out.inverse_frequencies, error);
}

void AttentionAttributes::write(FieldList& out) const {
  out.number("num_heads", query_heads);
  out.number("num_kv_heads", heads);
  out.number("head_dim", dim);
  out.number("sliding_window", sliding_window);
  if (!logit_text_.empty()) out.text("logit_numbers", logit_text_);
  out.text("input_names", input_names_);
  if (!compressed) return;
  out.text("key_stream", key_text_);
  out.text("value_stream", value_text_);
  out.text("inverse_frequencies", frequencies_text_);
}

const std::vector<FieldName>& CompressAttributes::names() {
  static const std::vector<FieldName> names = {
      {"num_kv_heads", PluginFieldType::kINT32},       {"head_dim", PluginFieldType::kINT32},
      {"stream", PluginFieldType::kCHAR},              {"stream_numbers", PluginFieldType::kCHAR},
      {"inverse_frequencies", PluginFieldType::kCHAR}, {"input_names", PluginFieldType::kCHAR},
  };
  return names;
}

bool CompressAttributes::parse(const PluginFieldCollection* fields, CompressAttributes& out, Error& error) {
  const FieldReader reader(kCompress, fields, error);
  if (!reader.only(names()) || !reader.number("num_kv_heads", 1, kMostHeads, out.heads) ||
      !reader.number("head_dim", 1, kMaxHeadDim, out.dim) ||
      !read_input_names(reader, out.input_names_, out.inputs)) {
    return false;
  }
  std::vector<float> numbers;
  return reader.floats("stream_numbers", out.numbers_text_, numbers) &&
         read_stream(reader, kCompress, "stream", nullptr, numbers, out.heads, out.dim, out.stream_text_, out.stream,
                     error) &&
         read_frequencies(reader, kCompress, out.dim, out.frequencies_text_, out.inverse_frequencies, error);
}

void CompressAttributes::write(FieldList& out) const {
  out.number("num_kv_heads", heads);
  out.number("head_dim", dim);
  out.text("stream", stream_text_);
  out.text("stream_numbers", numbers_text_);
  out.text("inverse_frequencies", frequencies_text_);
  out.text("input_names", input_names_);
}

}  // namespace minicache::trt
