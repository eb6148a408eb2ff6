#include "types.h"

#include <map>

namespace emulator {

Type type_of(const std::string& name) {
  static const std::map<std::string, Type> types = {
      {"u8", Type::u8},   {"u16", Type::u16},     {"u32", Type::u32},       {"u64", Type::u64},   {"s8", Type::s8},
      {"s16", Type::s16}, {"s32", Type::s32},     {"s64", Type::s64},       {"b8", Type::b8},     {"b16", Type::b16},
      {"b32", Type::b32}, {"b64", Type::b64},     {"f16", Type::f16},       {"bf16", Type::bf16}, {"f32", Type::f32},
      {"f64", Type::f64}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"pred", Type::pred}};
  const auto found = types.find(name);
  return found == types.end() ? Type::none : found->second;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::u8:
    case Type::s8:
    case Type::b8:
      return 1;
    case Type::u16:
    case Type::s16:
    case Type::b16:
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::u64:
    case Type::s64:
    case Type::b64:
    case Type::f64:
      return 8;
    case Type::pred:
      return 0;
    default:
      return 4;
  }
}

bool is_signed(Type type) { return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64; }
bool is_float(Type type) { return type == Type::f32 || type == Type::f64 || type == Type::f16 || type == Type::bf16; }

}  // namespace emulator
