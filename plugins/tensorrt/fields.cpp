#include "tensorrt/fields.h"

#include <charconv>
#include <cstring>
#include <sstream>
#include <type_traits>

namespace minicache::trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const PluginField* FieldReader::find(const char* name) const {
  for (std::int32_t i = 0; fields_ != nullptr && i < fields_->nbFields; ++i) {
    const PluginField& field = fields_->fields[i];
    if (field.name != nullptr && std::strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

bool FieldReader::only(const std::vector<FieldName>& names) const {
  for (std::int32_t i = 0; fields_ != nullptr && i < fields_->nbFields; ++i) {
    const char* name = fields_->fields[i].name;
    bool known = false;
    for (const FieldName& field : names) known = known || (name != nullptr && std::strcmp(field.name, name) == 0);
    if (known) continue;
    std::string all;
    for (const FieldName& field : names) all += (all.empty() ? "" : ", ") + std::string(field.name);
    return error_("%s: field %s: expected one of %s", op_, name == nullptr ? "without a name" : name, all.c_str());
  }
  return true;
}

bool FieldReader::number(const char* name, std::int64_t lowest, std::int64_t highest, std::int32_t& out) const {
  const PluginField* field = find(name);
  if (field == nullptr || field->data == nullptr) return error_("%s: field %s is missing", op_, name);
  const bool wide = field->type == PluginFieldType::kINT64;
  if (!wide && field->type != PluginFieldType::kINT32)
    return error_("%s: %s: expected an integer, got a field of type %d", op_, name, static_cast<int>(field->type));
  if (field->length != 1) return error_("%s: %s: expected one integer, got %d", op_, name, field->length);
  std::int32_t narrow = 0;
  std::int64_t value = 0;
  std::memcpy(wide ? static_cast<void*>(&value) : &narrow, field->data, wide ? sizeof(value) : sizeof(narrow));
  if (!wide) value = narrow;
  if (value < lowest || value > highest) {
    return error_("%s: %s: expected %lld to %lld, got %lld", op_, name, static_cast<long long>(lowest),
                  static_cast<long long>(highest), static_cast<long long>(value));
  }
  out = static_cast<std::int32_t>(value);
  return true;
}

bool FieldReader::text(const char* name, std::string& out) const {
  const PluginField* field = find(name);
  if (field == nullptr) return error_("%s: field %s is missing", op_, name);
  if (field->type != PluginFieldType::kCHAR)
    return error_("%s: %s: expected text, got a field of type %d", op_, name, static_cast<int>(field->type));
  if (field->length < 0 || (field->length > 0 && field->data == nullptr))
    return error_("%s: %s: expected text, got none", op_, name);
  out.assign(static_cast<const char*>(field->data), static_cast<std::size_t>(field->length));
  while (!out.empty() && out.back() == '\0') out.pop_back();  // some callers count the closing zero, some do not
  return true;
}

template <class T>
bool FieldReader::list(const char* name, const char* expected, std::string& all, std::vector<T>& out) const {
  if (!text(name, all)) return false;
  out.clear();
  for (const std::string& word : split_words(all)) {
    T value{};
    const char* const end = word.data() + word.size();
    const std::from_chars_result result = std::from_chars(word.data(), end, value);  // whatever the locale
    if (result.ec != std::errc() || result.ptr != end)
      return error_("%s: %s: expected %s, got '%s'", op_, name, expected, word.c_str());
    out.push_back(value);
  }
  return true;
}

bool FieldReader::integers(const char* name, std::string& text, std::vector<std::int32_t>& out) const {
  return list(name, "integers separated by spaces", text, out);
}

bool FieldReader::floats(const char* name, std::string& text, std::vector<float>& out) const {
  return list(name, "numbers separated by spaces", text, out);
}

std::vector<std::string> split_words(const std::string& text) {
  std::istringstream words(text);
  std::vector<std::string> result;
  for (std::string word; words >> word;) result.push_back(word);
  return result;
}

void FieldList::number(const char* name, const std::int32_t& value) {
  fields_.emplace_back(name, &value, PluginFieldType::kINT32, 1);
}

void FieldList::text(const char* name, const std::string& value) {
  fields_.emplace_back(name, value.data(), PluginFieldType::kCHAR, static_cast<std::int32_t>(value.size()));
}

const nvinfer1::PluginFieldCollection* FieldList::collection() {
  collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

}  // namespace minicache::trt
