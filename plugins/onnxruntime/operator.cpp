#include "onnxruntime/operator.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace minicache::ort {
namespace {

constexpr int kPartTokens = 512;  // tokens of one part of a decode: whatever else runs, a sequence is cut alike
constexpr int kPartRows = 1024;   // query rows of one part of a prefill chunk
constexpr float kLargest = 3.0e38f;

// Memory a thread keeps between runs.
float* scratch(std::int64_t floats) {
  static thread_local std::vector<float> memory;
  if (static_cast<std::int64_t>(memory.size()) < floats + 16) memory.resize(static_cast<std::size_t>(floats) + 16);
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory.data());
  return reinterpret_cast<float*>((start + 63) / 64 * 64);
}

template <class Function>
Status* parallel(const Api& api, const KernelContext* context, std::size_t total, const Function& function) {
  if (total == 1) {
    function(0);
    return nullptr;
  }
  const auto call = [](void* data, std::size_t i) { (*static_cast<const Function*>(data))(i); };
  return api.parallel_for(context, call, total, 0, const_cast<Function*>(&function));
}

// A node's inputs by what they are; null pointers and zero extents for those it does not have.
class Inputs {
 public:
  Inputs(const Api& api, const KernelContext* context, const std::vector<std::string>& names)
      : api_(api), context_(context), names_(names) {}

  void* data(const std::string& name) {
    const Value* value = find(name);
    void* result = nullptr;
    if (value != nullptr) keep(api_.data(const_cast<Value*>(value), &result));
    return result;
  }
  template <class T>
  T* data(const std::string& name) {
    return static_cast<T*>(data(name));
  }

  // Up to five extents.
  std::array<std::int64_t, 5> shape(const std::string& name) {
    std::array<std::int64_t, 5> result{};
    const Value* value = find(name);
    ShapeInfo* info = nullptr;
    if (value == nullptr || !keep(api_.shape(value, &info))) return result;
    std::size_t rank = 0;
    if (keep(api_.rank(info, &rank))) keep(api_.dimensions(info, result.data(), minimum<std::size_t>(rank, 5)));
    api_.release(info);
    return result;
  }
  std::int32_t extent(const std::string& name, int axis) { return static_cast<std::int32_t>(shape(name)[axis]); }

  // The first error there was, or null.
  Status* status() const { return status_; }

 private:
  const Value* find(const std::string& name) {
    for (std::size_t i = 0; i < names_.size(); ++i) {
      const Value* value = nullptr;
      if (names_[i] == name) return keep(api_.input(context_, i, &value)) ? value : nullptr;
    }
    return nullptr;
  }
  bool keep(Status* status) {
    if (status == nullptr) return true;
    if (status_ == nullptr) {
      status_ = status;
    } else {
      api_.release(status);
    }
    return false;
  }

  const Api& api_;
  const KernelContext* context_;
  const std::vector<std::string>& names_;
  Status* status_ = nullptr;
};

StreamView stream_view(Inputs& inputs, const char* part, const StreamShape& shape) {
  const std::string prefix = std::string(part) + ".", maps = prefix + "read.";
  StreamView view{};
  view.shape = &shape;
  view.pools.latent = inputs.data(prefix + "latent");
  view.pools.codes = inputs.data<std::int8_t>(prefix + "codes");
  view.pools.params = inputs.data<Half>(prefix + "params");
  view.pools.norms = inputs.data<Half>(prefix + "norms");
  view.pools.residual = inputs.data<std::int8_t>(prefix + "residual");
  view.pools.residual_params = inputs.data<Half>(prefix + "residual_params");
  view.pools.exact = inputs.data(prefix + "exact");
  view.pools.exact_params = inputs.data<Half>(prefix + "exact_params");
  view.pools.retained_index = inputs.data<std::int8_t>(prefix + "retained_index");
  view.maps.map = inputs.data<float>(maps + "map");
  view.maps.map_heads = inputs.extent(maps + "map", 0);
  view.maps.residual_map = inputs.data<float>(maps + "residual_map");
  view.maps.offset = inputs.data<float>(maps + "offset");
  view.maps.slots = inputs.data<std::int64_t>(maps + "slots");
  return view;
}

}  // namespace

struct PagedAttention::Run {
  AttentionArguments arguments{};
  const float *k = nullptr, *v = nullptr;
};

PagedAttention::PagedAttention(const Api& api, Attributes attributes)
    : api_(api), attributes_(std::move(attributes)), kernels_(cpu::kernels(std::getenv("MINICACHE_CPU_ISA"))) {
  const bool rotates = attributes_.compressed && attributes_.key.basis == Basis::pre_rope;
  if (rotates) rotation_ = cpu::RotationTable::shared(attributes_.inverse_frequencies);
}

Status* PagedAttention::bind(KernelContext* context, Run& run) const {
  Inputs inputs(api_, context, attributes_.inputs);
  AttentionArguments& a = run.arguments;
  const int dim = attributes_.dim;
  a.type = Type::float32;
  a.shape = {attributes_.query_heads, attributes_.heads, dim, attributes_.scale, attributes_.softcap, nullptr};
  a.step.query_start = inputs.data<std::int32_t>("query_start");
  a.step.context_len = inputs.data<std::int32_t>("context_len");
  a.step.slot_mapping = inputs.data<std::int32_t>("slot_mapping");
  a.step.full_table = inputs.data<std::int32_t>("full_table");
  a.step.tokens = inputs.extent("slot_mapping", 0);
  a.step.sequences = inputs.extent("context_len", 0);
  a.step.decodes = inputs.extent("decode_rows", 0);
  a.step.full_columns = inputs.extent("full_table", 1);
  if (attributes_.compressed) {
    a.step.compressed_len = inputs.data<std::int32_t>("compressed_len");
    a.step.compressed_table = inputs.data<std::int32_t>("compressed_table");
    a.step.compressed_columns = inputs.extent("compressed_table", 1);
    a.key = stream_view(inputs, "key", attributes_.key);
    a.value = stream_view(inputs, "value", attributes_.value);
  }
  a.sliding_window = attributes_.sliding_window;
  a.q = inputs.data("q");
  a.q_stride = a.out_stride = static_cast<std::int64_t>(attributes_.query_heads) * dim;
  run.k = inputs.data<float>("k");
  run.v = inputs.data<float>("v");
  const void* kv = inputs.data("kv");
  const std::array<std::int64_t, 5> kv_shape = inputs.shape("kv");
  if (inputs.status() != nullptr) return inputs.status();
  const std::int64_t out_shape[2] = {a.step.tokens, a.q_stride};
  Value *out = nullptr, *updated = nullptr;
  if (Status* status = api_.output(context, 0, out_shape, 2, &out)) return status;
  if (Status* status = api_.output(context, 1, kv_shape.data(), 5, &updated)) return status;
  if (Status* status = api_.data(out, &a.out)) return status;
  if (Status* status = api_.data(updated, &a.kv)) return status;
  if (a.kv == kv) return nullptr;
  // The pool was not bound to both ends of the graph: then an update is a copy.
  std::size_t bytes = sizeof(float);
  for (const std::int64_t extent : kv_shape) bytes *= static_cast<std::size_t>(extent);
  std::memcpy(a.kv, kv, bytes);
  return nullptr;
}

Status* PagedAttention::append(KernelContext* context, const Run& run) const {
  const AttentionArguments& a = run.arguments;
  const int dim = a.shape.dim, heads = a.shape.heads;
  const FullTier<float> tier{static_cast<float*>(a.kv), heads, dim};
  const auto token = [&](std::size_t t) {
    const int slot = a.step.slot_mapping[t], offset = slot % kBlockSize;
    for (const Part part : {Part::key, Part::value}) {
      const float* from = (part == Part::key ? run.k : run.v) + static_cast<std::int64_t>(t) * heads * dim;
      for (int head = 0; head < heads; ++head, from += dim) {
        float* to = tier.block(slot / kBlockSize, part, head) + offset * dim;
        for (int i = 0; i < dim; ++i) to[i] = std::fabs(from[i]) < kLargest ? from[i] : 0.0f;
      }
    }
  };
  if (a.step.tokens > kBlockSize) return parallel(api_, context, static_cast<std::size_t>(a.step.tokens), token);
  for (int t = 0; t < a.step.tokens; ++t) token(static_cast<std::size_t>(t));
  return nullptr;
}

Status* PagedAttention::decode(KernelContext* context, const Run& run) const {
  const AttentionArguments& a = run.arguments;
  const int group = a.shape.query_heads / a.shape.heads, dim = a.shape.dim, heads = a.shape.heads;
  static thread_local std::vector<cpu::DecodePart> parts;
  static thread_local std::vector<float> partials;
  parts.clear();
  int longest = 0;
  for (int s = 0; s < a.step.decodes; ++s) {
    const int compressed = a.step.compressed(s), length = a.step.context_len[s];
    const int first = a.sliding_window > 0 ? maximum(0, length - a.sliding_window) : 0;
    longest = maximum(longest, compressed);
    for (int head = 0; head < heads; ++head) {
      for (const bool tier : {true, false}) {
        const int start = tier ? 0 : compressed, end = tier ? compressed : length;
        for (int from = start; from < end; from += kPartTokens) {
          const int low = maximum(from, first), high = minimum(from + kPartTokens, end);
          if (low < high) parts.push_back({s, head, tier, low - start, high - start});
        }
      }
    }
  }
  const std::int64_t each = static_cast<std::int64_t>(group) * (2 + dim);
  partials.resize(parts.size() * static_cast<std::size_t>(each));
  const float* turns = rotation_ == nullptr || longest == 0 ? nullptr : rotation_->of(longest);
  const std::int64_t room = cpu::decode_scratch(a, key_, value_);
  const cpu::DecodePart* const all = parts.data();
  float* const results = partials.data();
  const auto attend = [&](std::size_t i) {
    kernels_.decode_part(a, key_, value_, all[i], turns, scratch(room), results + static_cast<std::int64_t>(i) * each);
  };
  if (Status* status = parallel(api_, context, parts.size(), attend)) return status;
  for (std::size_t i = 0; i < parts.size();) {
    std::size_t end = i;
    while (end < parts.size() && all[end].sequence == all[i].sequence && all[end].head == all[i].head) ++end;
    float* row = static_cast<float*>(a.out) + a.step.query_start[all[i].sequence] * a.out_stride;
    kernels_.combine_parts(group, dim, static_cast<int>(end - i), results + static_cast<std::int64_t>(i) * each,
                          row + static_cast<std::int64_t>(all[i].head) * group * dim);
    i = end;
  }
  return nullptr;
}

Status* PagedAttention::prefill(KernelContext* context, const Run& run) const {
  const AttentionArguments& a = run.arguments;
  const int group = a.shape.query_heads / a.shape.heads;
  static thread_local std::vector<cpu::PrefillPart> parts;
  parts.clear();
  int longest = 0, most = 0;
  for (int s = a.step.decodes; s < a.step.sequences; ++s) {
    const int rows = (a.step.query_start[s + 1] - a.step.query_start[s]) * group;
    longest = maximum(longest, a.step.compressed(s));
    for (int head = 0; head < a.shape.heads; ++head) {
      for (int first = 0; first < rows; first += kPartRows) {
        parts.push_back({s, head, first, minimum(kPartRows, rows - first)});
        most = maximum(most, parts.back().count);
      }
    }
  }
  const float* turns = rotation_ == nullptr || longest == 0 ? nullptr : rotation_->of(longest);
  const std::int64_t room = cpu::prefill_scratch(a, key_, value_, most);
  const cpu::PrefillPart* const all = parts.data();
  return parallel(api_, context, parts.size(), [&](std::size_t i) {
    kernels_.prefill_part(a, key_, value_, all[i], turns, scratch(room));
  });
}

Status* PagedAttention::compute(KernelContext* context) {
  Run run;
  if (Status* status = bind(context, run)) return status;
  if (attributes_.compressed) {
    std::call_once(prepared_, [&] {
      key_ = cpu::Reader(run.arguments.key);
      value_ = cpu::Reader(run.arguments.value);
    });
  }
  if (Status* status = append(context, run)) return status;
  if (run.arguments.step.decodes > 0) {
    if (Status* status = decode(context, run)) return status;
  }
  return run.arguments.step.decodes < run.arguments.step.sequences ? prefill(context, run) : nullptr;
}

}  // namespace minicache::ort
