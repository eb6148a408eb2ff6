#include "tensorrt/paged_attention.h"

namespace minicache::trt {
namespace {

std::vector<Binding> known_inputs(const AttentionAttributes& a) {
  using namespace symbol;
  const std::int64_t row = std::int64_t{a.heads} * a.dim;
  std::vector<Binding> result = {
      {"q", Element::model, {tokens, std::int64_t{a.query_heads} * a.dim}},
      {"k", Element::model, {tokens, row}},
      {"v", Element::model, {tokens, row}},
      {"kv", Element::model, {full_blocks, 2, a.heads, kBlockSize, a.dim}},
      {"query_start", Element::int32, {boundaries}},
      {"context_len", Element::int32, {sequences}},
      {"slot_mapping", Element::int32, {tokens}},
      {"full_table", Element::int32, {sequences, full_columns}},
      {"decode_rows", Element::int32, {decodes}},
      {"prefill_rows", Element::int32, {chunks, longest}},
      {"full_work", Element::int32, {any}, false},
      {"prefill_past", Element::int32, {any}, false},
  };
  if (!a.compressed) return result;
  result.push_back({"compressed_len", Element::int32, {sequences}});
  result.push_back({"compressed_table", Element::int32, {sequences, compressed_columns}});
  result.push_back({"compressed_work", Element::int32, {any}, false});
  add_reader("key.", a.key, result);
  add_reader("value.", a.value, result);
  return result;
}

std::vector<float> device_numbers(const AttentionAttributes& a) {
  return a.compressed && a.key.basis == Basis::pre_rope ? a.inverse_frequencies : std::vector<float>{};
}

}  // namespace

std::unique_ptr<PagedAttention> PagedAttention::make(const nvinfer1::PluginFieldCollection* fields,
                                                     nvinfer1::TensorRTPhase phase, Error& error) {
  AttentionAttributes attributes{};
  Bindings inputs;
  if (!AttentionAttributes::parse(fields, attributes, error) ||
      !inputs.resolve(kName, attributes.inputs, known_inputs(attributes), error)) {
    return nullptr;
  }
  return std::make_unique<PagedAttention>(attributes, inputs, phase);
}

PagedAttention::PagedAttention(const AttentionAttributes& attributes, const Bindings& own,
                               nvinfer1::TensorRTPhase phase)
    : CachePlugin(kName, phase, own, {{own.place("q"), false}, {own.place("kv"), true}}, device_numbers(attributes)),
      attributes_(attributes) {
  const auto place = [&](const char* name) { return inputs().place(name); };
  at_ = {place("q"),
         place("k"),
         place("v"),
         place("kv"),
         place("query_start"),
         place("context_len"),
         place("compressed_len"),
         place("slot_mapping"),
         place("full_table"),
         place("compressed_table"),
         place("decode_rows"),
         place("prefill_rows"),
         places_of("key."),
         places_of("value.")};
  keep(attributes_);
}

std::unique_ptr<CachePlugin> PagedAttention::copy() const {
  return std::make_unique<PagedAttention>(attributes_, inputs(), phase());
}

PagedAttention::StreamPlaces PagedAttention::places_of(const std::string& prefix) const {
  const auto place = [&](const char* name) { return inputs().place(prefix + name); };
  return {place("latent"),   place("codes"),        place("params"),         place("norms"),
          place("residual"), place("residual_params"), place("exact"),       place("exact_params"),
          place("retained_index"), place("read.map"), place("read.residual_map"), place("read.offset"),
          place("read.slots")};
}

StreamView PagedAttention::view(const StreamShape& shape, const StreamPlaces& places, const void* const* inputs,
                                const Shapes& shapes) const {
  alignas(16) static const char present[16] = {};
  const auto at = [&](std::int32_t place) -> const void* {
    return place < 0 ? nullptr : inputs == nullptr ? present : inputs[place];
  };
  const auto pool = [&](std::int32_t place) { return const_cast<void*>(at(place)); };
  const auto halves = [&](std::int32_t place) { return static_cast<Half*>(pool(place)); };
  const auto bytes = [&](std::int32_t place) { return static_cast<std::int8_t*>(pool(place)); };
  const auto floats = [&](std::int32_t place) { return static_cast<const float*>(at(place)); };
  const StreamPools pools{pool(places.latent),     bytes(places.codes),           halves(places.params),
                          halves(places.norms),    bytes(places.residual),        halves(places.residual_params),
                          pool(places.exact),      halves(places.exact_params),   bytes(places.retained_index)};
  const ReadMaps maps{floats(places.map),
                      floats(places.residual_map),
                      floats(places.offset),
                      nullptr,
                      static_cast<const std::int64_t*>(at(places.slots)),
                      places.map < 0 ? 0 : shapes.extent(places.map, 0)};
  return {&shape, pools, maps};
}

AttentionArguments PagedAttention::arguments(const Shapes& shapes, Type type, const void* const* inputs) const {
  const auto ids = [&](std::int32_t place) {
    return inputs == nullptr || place < 0 ? nullptr : static_cast<const std::int32_t*>(inputs[place]);
  };
  AttentionArguments a{};
  a.type = type;
  a.shape = {attributes_.query_heads, attributes_.heads, attributes_.dim,
             attributes_.scale,       attributes_.softcap, table()};
  a.step = {ids(at_.query_start),
            ids(at_.context_len),
            ids(at_.compressed_len),
            ids(at_.slot_mapping),
            ids(at_.full_table),
            ids(at_.compressed_table),
            shapes.extent(at_.slot_mapping, 0),
            shapes.extent(at_.context_len, 0),
            shapes.extent(at_.decode_rows, 0),
            shapes.extent(at_.full_table, 1),
            attributes_.compressed ? shapes.extent(at_.compressed_table, 1) : 0,
            shapes.extent(at_.prefill_rows, 1)};
  a.full_blocks = shapes.extent(at_.kv, 0);
  a.sliding_window = attributes_.sliding_window;
  a.q_stride = a.out_stride = std::int64_t{attributes_.query_heads} * attributes_.dim;
  if (attributes_.compressed) {
    a.key = view(attributes_.key, at_.key, inputs, shapes);
    a.value = view(attributes_.value, at_.value, inputs, shapes);
  }
  return a;
}

// Largest extents are bounds, each for itself: more decodes and chunks than there are sequences may be among them. So
// the two parts are sized one by one, each with a step that has as many sequences as it needs.
std::int64_t PagedAttention::workspace_bytes(const Shapes& shapes, Type type) const {
  AttentionArguments a = arguments(shapes, type, nullptr);
  const std::int32_t chunks = minimum(shapes.extent(at_.prefill_rows, 0), a.step.tokens);
  std::int64_t decode = 0, prefill = 0;
  if (a.step.decodes > 0) {
    a.step.sequences = maximum(a.step.sequences, a.step.decodes);
    a.step.tokens = maximum(a.step.tokens, a.step.decodes);
    decode = minicache_decode_workspace(&a);
    if (decode == 0) return -1;
  }
  if (chunks > 0) {
    a.step.sequences = chunks;
    a.step.decodes = 0;
    a.step.longest_chunk = maximum(a.step.longest_chunk, a.step.tokens);
    prefill = minicache_prefill_workspace(&a);
    if (prefill < 0) return -1;
  }
  return maximum(decode, prefill);
}

std::int32_t PagedAttention::launch(const Call& call) const {
  AttentionArguments a = arguments(call.shapes, call.type, call.inputs);
  a.kv = call.outputs[1];
  a.q = call.inputs[at_.q];
  a.out = call.outputs[0];
  const std::int64_t row = std::int64_t{attributes_.heads} * attributes_.dim;
  std::int32_t status =
      minicache_append_kv(call.type, a.kv, a.full_blocks, attributes_.heads, attributes_.dim, call.inputs[at_.k],
                          call.inputs[at_.v], row, row, a.step.slot_mapping, a.step.tokens, call.stream);
  if (status == ok && a.step.decodes > 0)
    status = minicache_decode_attention(&a, call.workspace, minicache_decode_workspace(&a), call.stream);
  if (status == ok && a.step.sequences > a.step.decodes)
    status = minicache_prefill_attention(&a, call.workspace, minicache_prefill_workspace(&a), call.stream);
  return status;
}

}  // namespace minicache::trt
