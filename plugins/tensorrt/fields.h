// A node's attributes as TensorRT hands them over: named fields, read once when a plugin is made, and written back so
// that an engine can make it again.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "minicache/descriptor.h"

namespace minicache::trt {

// What a plugin's fields are called and of which type; the type decides how the ONNX parser reads an attribute.
struct FieldName {
  const char* name;
  nvinfer1::PluginFieldType type;  // kINT32: one number; kCHAR: text
};

// Reads fields. Every problem becomes a message that names the field, what was expected and what came.
class FieldReader {
 public:
  FieldReader(const char* op, const nvinfer1::PluginFieldCollection* fields, Error& error)
      : op_(op), fields_(fields), error_(error) {}

  // No field has another name.
  bool only(const std::vector<FieldName>& names) const;
  bool has(const char* name) const { return find(name) != nullptr; }
  bool number(const char* name, std::int64_t lowest, std::int64_t highest, std::int32_t& out) const;
  bool text(const char* name, std::string& out) const;
  // Text of numbers, or of words, separated by spaces.
  bool integers(const char* name, std::string& text, std::vector<std::int32_t>& out) const;
  bool floats(const char* name, std::string& text, std::vector<float>& out) const;

 private:
  const nvinfer1::PluginField* find(const char* name) const;
  template <class T>
  bool list(const char* name, const char* expected, std::string& text, std::vector<T>& out) const;

  const char* op_;
  const nvinfer1::PluginFieldCollection* fields_;
  Error& error_;
};

std::vector<std::string> split_words(const std::string& text);

// Fields for an engine to keep. They point to the values given, which outlive them.
class FieldList {
 public:
  FieldList() = default;
  FieldList(const FieldList&) = delete;
  FieldList& operator=(const FieldList&) = delete;

  void number(const char* name, const std::int32_t& value);
  void text(const char* name, const std::string& value);
  const nvinfer1::PluginFieldCollection* collection();

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace minicache::trt
