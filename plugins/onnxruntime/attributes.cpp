#include <cmath>
#include <cstdlib>
#include <sstream>

#include "onnxruntime/operator.h"

namespace minicache::ort {
namespace {

struct Node {
  const Api& api;
  const KernelInfo* info;
  Error& error;

  bool number(const char* name, std::int32_t& out) const {
    std::int64_t value = 0;
    Status* status = api.attribute(info, name, &value);
    if (status != nullptr) {
      api.release(status);
      return error("PagedAttention: attribute %s is missing", name);
    }
    out = static_cast<std::int32_t>(value);
    return true;
  }

  // Bytes of a text, its closing zero included; 0 where the node has none.
  std::size_t size(const char* name) const {
    std::size_t result = 0;
    Status* status = api.attribute(info, name, nullptr, &result);
    if (status != nullptr) api.release(status);
    return result;
  }

  bool text(const char* name, std::string& out) const {
    std::size_t size = this->size(name);
    if (size == 0) return error("PagedAttention: attribute %s is missing", name);
    out.resize(size);
    Status* status = api.attribute(info, name, out.data(), &size);
    if (status != nullptr) {
      api.release(status);
      return error("PagedAttention: attribute %s cannot be read", name);
    }
    out.resize(size - 1);  // without the closing zero
    return true;
  }

  template <class T>
  bool list(const char* name, std::vector<T>& out) const {
    std::string all;
    if (!text(name, all)) return false;
    std::istringstream words(all);
    for (std::string word; words >> word;) {
      char* end = nullptr;
      const double value = std::strtod(word.c_str(), &end);
      if (*end != '\0') return error("PagedAttention: attribute %s: expected numbers, got %s", name, word.c_str());
      out.push_back(static_cast<T>(value));
    }
    return true;
  }

  bool stream(const char* name, const Attributes& known, StreamShape& out) const {
    std::vector<std::int32_t> integers;
    const float floats[2] = {0.0f, 0.0f};  // t and gamma: readers need neither
    if (!list(name, integers)) return false;
    return parse_stream(integers.data(), static_cast<int>(integers.size()), floats, 2, known.heads, known.dim, out,
                        error);
  }
};

}  // namespace

bool read_attributes(const Api& api, const KernelInfo* info, Attributes& out, Error& error) {
  const Node node{api, info, error};
  std::string names;
  if (!node.number("num_heads", out.query_heads) || !node.number("num_kv_heads", out.heads) ||
      !node.number("head_dim", out.dim) || !node.number("sliding_window", out.sliding_window) ||
      !node.text("input_names", names)) {
    return false;
  }
  if (out.heads < 1 || out.query_heads % out.heads != 0 || out.query_heads / out.heads > cpu::kMaxGroupSize) {
    return error("PagedAttention: num_heads: expected a multiple of num_kv_heads %d, at most %d of it, got %d",
                 out.heads, cpu::kMaxGroupSize, out.query_heads);
  }
  if (out.dim < 16 || out.dim % 16 != 0 || out.dim > kMaxHeadDim) {
    return error("PagedAttention: head_dim: expected a multiple of 16 up to %d, got %d", kMaxHeadDim, out.dim);
  }
  out.scale = 1.0f / std::sqrt(static_cast<float>(out.dim));
  if (node.size("logit_numbers") > 0) {
    std::vector<float> numbers;
    if (!node.list("logit_numbers", numbers)) return false;
    if (numbers.size() != 2 || !(numbers[0] > 0.0f) || !(numbers[1] >= 0.0f))
      return error("PagedAttention: logit_numbers: expected a positive scale and a soft cap of at least 0");
    out.scale = numbers[0];
    out.softcap = numbers[1];
  }
  std::istringstream words(names);
  for (std::string word; words >> word;) {
    out.compressed = out.compressed || word == "compressed_table";
    out.inputs.push_back(word);
  }
  if (!out.compressed) return true;
  return node.stream("key_stream", out, out.key) && node.stream("value_stream", out, out.value) &&
         node.list("inverse_frequencies", out.inverse_frequencies);
}

}  // namespace minicache::ort
