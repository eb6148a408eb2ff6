// `PagedAttention` as a custom operator of ONNX Runtime: what a node says about itself, and one run of it.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/rotation.h"
#include "minicache/descriptor.h"
#include "onnxruntime/abi.h"

namespace minicache::ort {

// Attributes of a node (minicache_trt/model/attributes.py writes them).
struct Attributes {
  std::int32_t query_heads = 0, heads = 0, dim = 0, sliding_window = 0;
  float scale = 0.0f, softcap = 0.0f;
  std::vector<std::string> inputs;  // names in the order of the node's inputs
  bool compressed = false;
  StreamShape key{}, value{};
  std::vector<float> inverse_frequencies;
};

// False with a message if the node cannot be run.
bool read_attributes(const Api& api, const KernelInfo* info, Attributes& out, Error& error);

// The kernel of one node.
class PagedAttention {
 public:
  PagedAttention(const Api& api, Attributes attributes);
  Status* compute(KernelContext* context);

 private:
  struct Run;

  Status* bind(KernelContext* context, Run& run) const;
  Status* append(KernelContext* context, const Run& run) const;
  Status* decode(KernelContext* context, const Run& run) const;
  Status* prefill(KernelContext* context, const Run& run) const;

  Api api_;
  Attributes attributes_;
  const cpu::Kernels& kernels_;
  std::once_flag prepared_;
  cpu::Reader key_, value_;
  std::shared_ptr<cpu::RotationTable> rotation_;
};

}  // namespace minicache::ort
