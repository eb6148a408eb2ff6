// Types of PTX by their names.
#pragma once

#include <string>

namespace emulator {

enum class Type {
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  b8,
  b16,
  b32,
  b64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
  pred,
  none
};

Type type_of(const std::string& name);  // none: there is no such type
int bytes_of(Type type);                // 0: of a predicate
bool is_signed(Type type);
bool is_float(Type type);

}  // namespace emulator
