#include "tensorrt/bindings.h"

#include <array>

namespace minicache::trt {
namespace {

using nvinfer1::Dims;

std::string text_of(const std::vector<std::int64_t>& extents) {
  static const char* const names[symbol::kSymbols] = {"",   "*",  "T",  "S",  "S+1", "Nd", "Sp",
                                                      "Qm", "Mf", "Mc", "Nf", "Nc",  "N"};
  std::string result = "[";
  for (const std::int64_t extent : extents) {
    result += (result.size() > 1 ? ", " : "") + (extent < 0 ? names[-extent] : std::to_string(extent));
  }
  return result + "]";
}

std::string text_of(const Dims& dims) {
  std::string result = "[";
  for (int axis = 0; axis < dims.nbDims; ++axis) result += (axis > 0 ? ", " : "") + std::to_string(dims.d[axis]);
  return result + "]";
}

// Numbers the symbols of a node stand for, found as tensors are looked at.
class Symbols {
 public:
  Symbols() { values_.fill(-1); }

  bool agrees(std::int64_t symbol, std::int64_t value) {
    if (symbol == symbol::any) return true;
    std::int64_t& known = values_[static_cast<std::size_t>(-symbol)];
    if (known < 0) known = value;
    return known == value;
  }
  std::int64_t operator[](std::int64_t symbol) const { return values_[static_cast<std::size_t>(-symbol)]; }

 private:
  std::array<std::int64_t, symbol::kSymbols> values_;
};

void add(std::vector<Binding>& out, bool needed, const std::string& name, Element element,
         std::vector<std::int64_t> extents) {
  if (needed) out.push_back({name, element, std::move(extents)});
}

// By the table in minicache_trt/contract.py (StreamLayout).
void add_pools(const std::string& prefix, const StreamShape& s, std::vector<Binding>& out) {
  const std::int64_t blocks = symbol::compressed_blocks, tokens = kBlockSize;
  const bool slerp = s.merge == Merge::slerp, model = s.retained_format == Format::model;
  add(out, s.latent > 0, prefix + "latent", Element::model, {blocks, s.heads, tokens, s.latent});
  add(out, s.code_bytes > 0, prefix + "codes", Element::int8, {blocks, s.heads, tokens, s.code_bytes});
  add(out, s.params > 0, prefix + "params", Element::float16, {blocks, s.heads, s.params});
  add(out, s.has_norms(), prefix + "norms", Element::float16,
      {blocks, slerp ? s.members : 1, slerp ? s.norm_heads() : s.heads, tokens});
  add(out, s.has_residual(), prefix + "residual", Element::int8,
      {blocks, s.members, s.heads, tokens, s.residual_bytes()});
  add(out, s.has_residual(), prefix + "residual_params", Element::float16, {blocks, s.members, s.heads, 2 * tokens});
  add(out, s.retained > 0, prefix + "exact", model ? Element::model : Element::int8,
      {blocks, s.members, s.heads, s.retained, model ? s.dim : s.exact_bytes()});
  add(out, s.exact_params() > 0, prefix + "exact_params", Element::float16,
      {blocks, s.members, s.heads, s.exact_params()});
  add(out, s.retained > 0, prefix + "retained_index", Element::int8, {blocks, s.norm_heads(), s.retained});
}

}  // namespace

void add_reader(const std::string& prefix, const StreamShape& s, std::vector<Binding>& out) {
  const std::string maps = prefix + "read.";
  add_pools(prefix, s, out);
  // Linear and aligned streams have a map for each head; a transform alone is the same for all.
  const bool each = s.merge == Merge::linear || s.align;
  add(out, s.has_map(), maps + "map", Element::float32, {each ? s.heads : 1, s.dim, s.stored});
  add(out, s.has_residual() && s.align, maps + "residual_map", Element::float32, {s.heads, s.dim, s.dim});
  add(out, s.merge == Merge::linear, maps + "offset", Element::float32, {s.heads, 1, s.dim});
  add(out, s.match_heads, maps + "slots", Element::int64, {s.heads});
  if (s.match_heads) out.push_back({maps + "heads", Element::int64, {s.heads}, false});
}

void add_writer(const StreamShape& s, std::vector<Binding>& out) {
  const bool linear = s.merge == Merge::linear;
  if (!linear) out.push_back({"transform", Element::float32, {s.rank, s.stored}, false});
  add(out, !linear && s.align, "align", Element::float32, {s.members, s.heads, s.dim, s.dim});
  add(out, linear, "encode", Element::float32, {s.members, s.heads, s.dim, s.stored});
  add(out, linear, "bias", Element::float32, {s.heads, 1, s.stored});
  add(out, s.match_heads, "heads", Element::int64, {s.members, s.heads});
  for (int member = 0; linear && s.retained > 0 && member < s.members; ++member) {
    const std::string suffix = "." + std::to_string(member);
    add(out, true, "map" + suffix, Element::float32, {s.heads, s.dim, s.stored});
    add(out, true, "offset" + suffix, Element::float32, {s.heads, 1, s.dim});
  }
  add_pools("", s, out);
}

bool Bindings::resolve(const char* op, const std::vector<std::string>& names, const std::vector<Binding>& known,
                       Error& error) {
  inputs_.clear();
  for (const std::string& name : names) {
    if (place(name) >= 0) return error("%s: input_names: %s is there twice", op, name.c_str());
    const Binding* found = nullptr;
    for (const Binding& binding : known) found = binding.name == name ? &binding : found;
    if (found == nullptr)
      return error("%s: input_names: %s is no input of a node with these attributes", op, name.c_str());
    inputs_.push_back(*found);
  }
  for (const Binding& binding : known) {
    if (binding.required && place(binding.name) < 0)
      return error("%s: input_names: %s is missing", op, binding.name.c_str());
  }
  return true;
}

int Bindings::place(const std::string& name) const {
  for (int i = 0; i < size(); ++i) {
    if ((*this)[i].name == name) return i;
  }
  return -1;
}

int Bindings::model_place() const {
  for (int i = 0; i < size(); ++i) {
    if ((*this)[i].element == Element::model) return i;
  }
  return -1;
}

bool Bindings::check(const char* op, const Shapes& shapes, bool exact, Error& error) const {
  Symbols symbols;
  for (int i = 0; i < size(); ++i) {
    const Binding& binding = (*this)[i];
    const Dims& dims = shapes[i];
    bool fits = dims.nbDims == static_cast<std::int32_t>(binding.extents.size());
    for (int axis = 0; fits && axis < dims.nbDims; ++axis) {
      const std::int64_t extent = binding.extents[static_cast<std::size_t>(axis)], value = dims.d[axis];
      fits = extent >= 0 ? value == extent : value >= 0 && (!exact || symbols.agrees(extent, value));
    }
    if (fits) continue;
    return error("%s: %s: expected %s, got %s%s", op, binding.name.c_str(), text_of(binding.extents).c_str(),
                 text_of(dims).c_str(), exact ? "" : " at most");
  }
  const std::int64_t sequences = symbols[symbol::sequences], boundaries = symbols[symbol::boundaries];
  if (sequences < 0 || boundaries < 0) return true;
  if (boundaries != sequences + 1) {
    return error("%s: query_start: expected [%lld], got [%lld]", op, static_cast<long long>(sequences + 1),
                 static_cast<long long>(boundaries));
  }
  const std::int64_t decodes = symbols[symbol::decodes], chunks = symbols[symbol::chunks];
  if (decodes + chunks == sequences) return true;
  return error("%s: decode_rows and prefill_rows: expected %lld sequences in all, got %lld and %lld", op,
               static_cast<long long>(sequences), static_cast<long long>(decodes), static_cast<long long>(chunks));
}

}  // namespace minicache::trt
