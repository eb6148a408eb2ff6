// The tensors of a node: which input is what, of which type, with which extents.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "minicache/descriptor.h"

namespace minicache::trt {

enum class Element { model, float32, float16, int8, int32, int64 };  // model: the compute type, one for all of a node

// Extents no attribute tells. One symbol stands for one number in all tensors of a node (but `any` for any number).
namespace symbol {
constexpr std::int64_t any = -1, tokens = -2, sequences = -3, boundaries = -4, decodes = -5, chunks = -6, longest = -7,
                       full_columns = -8, compressed_columns = -9, full_blocks = -10, compressed_blocks = -11,
                       count = -12;
constexpr int kSymbols = 13;
}  // namespace symbol

// One tensor a node may have. Those that are not required are there for other runtimes and not read here.
struct Binding {
  std::string name;
  Element element;
  std::vector<std::int64_t> extents;
  bool required = true;
};

// Extents of a node's tensors: those of a call, or the largest or declared ones while an engine is built.
class Shapes {
 public:
  static Shapes of(const nvinfer1::PluginTensorDesc* descs) { return {&descs->dims, sizeof(*descs)}; }
  static Shapes largest(const nvinfer1::DynamicPluginTensorDesc* descs) { return {&descs->max, sizeof(*descs)}; }

  const nvinfer1::Dims& operator[](int place) const {
    return *reinterpret_cast<const nvinfer1::Dims*>(first_ + static_cast<std::size_t>(place) * stride_);
  }
  std::int32_t extent(int place, int axis) const { return static_cast<std::int32_t>((*this)[place].d[axis]); }

 private:
  Shapes(const nvinfer1::Dims* first, std::size_t stride)
      : first_(reinterpret_cast<const char*>(first)), stride_(stride) {}

  const char* first_;
  std::size_t stride_;
};

// The inputs of one node, in its order.
class Bindings {
 public:
  // `names`: what each input is, of those in `known`. False with a message if they make no node.
  bool resolve(const char* op, const std::vector<std::string>& names, const std::vector<Binding>& known, Error& error);

  int size() const { return static_cast<int>(inputs_.size()); }
  const Binding& operator[](int place) const { return inputs_[static_cast<std::size_t>(place)]; }
  // Which input this is, -1 if the node has none.
  int place(const std::string& name) const;
  // An input in the compute type.
  int model_place() const;
  // Ranks, extents and the symbols they share. Largest extents while building are bounds of one tensor each: `exact` is
  // false, and symbols are not compared.
  bool check(const char* op, const Shapes& shapes, bool exact, Error& error) const;

 private:
  std::vector<Binding> inputs_;
};

// Pools and reading maps of a stream a layer attends to; names begin with `prefix`.
void add_reader(const std::string& prefix, const StreamShape& shape, std::vector<Binding>& out);
// Maps a stream is compressed with, and its pools.
void add_writer(const StreamShape& shape, std::vector<Binding>& out);

}  // namespace minicache::trt
