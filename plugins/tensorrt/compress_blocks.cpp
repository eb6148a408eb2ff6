#include "tensorrt/compress_blocks.h"

namespace minicache::trt {
namespace {

std::vector<Binding> known_inputs(const CompressAttributes& a) {
  using namespace symbol;
  std::vector<Binding> result = {{"source_blocks", Element::int32, {count}},
                                 {"target_blocks", Element::int32, {count}},
                                 {"block_index", Element::int32, {count}}};
  for (int member = 0; member < a.stream.members; ++member) {
    result.push_back(
        {"kv" + std::to_string(member), Element::model, {full_blocks, 2, a.heads, kBlockSize, a.dim}});
  }
  add_writer(a.stream, result);
  return result;
}

bool is_pool(const Binding& binding) { return binding.extents.front() == symbol::compressed_blocks; }

std::vector<float> device_numbers(const CompressAttributes& a) {
  return a.stream.basis == Basis::pre_rope ? a.inverse_frequencies : std::vector<float>{};
}

}  // namespace

std::unique_ptr<CompressBlocks> CompressBlocks::make(const nvinfer1::PluginFieldCollection* fields,
                                                     nvinfer1::TensorRTPhase phase, Error& error) {
  CompressAttributes attributes{};
  Bindings inputs;
  if (!CompressAttributes::parse(fields, attributes, error) ||
      !inputs.resolve(kName, attributes.inputs, known_inputs(attributes), error)) {
    return nullptr;
  }
  return std::make_unique<CompressBlocks>(attributes, inputs, phase);
}

CompressBlocks::CompressBlocks(const CompressAttributes& attributes, const Bindings& own,
                               nvinfer1::TensorRTPhase phase)
    : CachePlugin(kName, phase, own, pools_of(own), device_numbers(attributes)), attributes_(attributes) {
  const auto place = [&](const std::string& name) { return inputs().place(name); };
  const auto output = [&](const char* name) {
    std::int32_t result = place(name) < 0 ? -1 : 0;
    for (std::int32_t i = 0; i < place(name); ++i) result += is_pool(inputs()[i]) ? 1 : 0;
    return result;
  };
  at_ = {place("source_blocks"), place("target_blocks"), place("block_index"),   {},
         place("align"),         place("encode"),        place("bias"),          place("heads"),
         {},                     {},                     output("latent"),       output("codes"),
         output("params"),       output("norms"),        output("residual"),     output("residual_params"),
         output("exact"),        output("exact_params"), output("retained_index")};
  for (int member = 0; member < kMaxGroup; ++member) {
    const std::string number = std::to_string(member);
    at_.kv[member] = place("kv" + number);
    at_.map[member] = place("map." + number);
    at_.offset[member] = place("offset." + number);
  }
  keep(attributes_);
}

std::vector<CachePlugin::Output> CompressBlocks::pools_of(const Bindings& inputs) {
  std::vector<Output> result;
  for (int place = 0; place < inputs.size(); ++place) {
    if (is_pool(inputs[place])) result.push_back({place, true});
  }
  return result;
}

std::unique_ptr<CachePlugin> CompressBlocks::copy() const {
  return std::make_unique<CompressBlocks>(attributes_, inputs(), phase());
}

std::int64_t CompressBlocks::workspace_bytes(const Shapes& shapes, Type type) const {
  return minicache_compress_workspace(type, &attributes_.stream, shapes.extent(at_.source_blocks, 0));
}

std::int32_t CompressBlocks::launch(const Call& call) const {
  const auto ids = [&](std::int32_t place) { return static_cast<const std::int32_t*>(call.inputs[place]); };
  const auto floats = [&](std::int32_t place) {
    return place < 0 ? nullptr : static_cast<const float*>(call.inputs[place]);
  };
  const auto pool = [&](std::int32_t output) { return output < 0 ? nullptr : call.outputs[output]; };
  const auto halves = [&](std::int32_t output) { return static_cast<Half*>(pool(output)); };
  const auto bytes = [&](std::int32_t output) { return static_cast<std::int8_t*>(pool(output)); };
  const StreamPools pools{pool(at_.latent),   bytes(at_.codes),         halves(at_.params),
                          halves(at_.norms),  bytes(at_.residual),      halves(at_.residual_params),
                          pool(at_.exact),    halves(at_.exact_params), bytes(at_.retained_index)};
  WriteMaps maps{};
  maps.align = floats(at_.align);
  maps.encode = floats(at_.encode);
  maps.bias = floats(at_.bias);
  maps.heads = at_.heads < 0 ? nullptr : static_cast<const std::int64_t*>(call.inputs[at_.heads]);
  const void* layers[kMaxGroup] = {};
  for (int member = 0; member < attributes_.stream.members; ++member) {
    layers[member] = call.inputs[at_.kv[member]];
    maps.map[member] = floats(at_.map[member]);
    maps.offset[member] = floats(at_.offset[member]);
  }
  return minicache_compress_blocks(call.type, &attributes_.stream, layers, ids(at_.source_blocks),
                                   ids(at_.target_blocks), ids(at_.block_index),
                                   call.shapes.extent(at_.source_blocks, 0), &pools, &maps, table(), call.workspace,
                                   workspace_bytes(call.shapes, call.type), call.stream);
}

}  // namespace minicache::trt
