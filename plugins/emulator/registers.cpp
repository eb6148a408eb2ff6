#include "registers.h"

#include <algorithm>
#include <cstring>

namespace emulator {

Registers::Registers(const KernelText& kernel, const ModuleText& module,
                     const std::map<std::string, const char*>& constants, Program& program)
    : kernel_(kernel), program_(program) {
  for (const auto& [name, address] : constants) symbols_[name] = reinterpret_cast<u64>(address);
  lay_out(module);
  reserve_registers();
}

bool Registers::has(const std::string& name) const { return kernel_.registers.count(name) != 0; }

u32 Registers::address(const std::string& symbol) {
  const auto found = symbols_.find(symbol);
  if (found == symbols_.end()) throw UnsupportedPtx("symbol " + symbol);
  return constant(found->second, 8);
}

void Registers::lay_out(const ModuleText& module) {
  s64 at = 0;
  auto place = [&](s64& end, const Variable& variable) {
    end = (end + variable.align - 1) / variable.align * variable.align;
    const s64 start = end;
    end += variable.bytes;
    return start;
  };
  std::vector<s64> offsets;
  for (const Variable& parameter : kernel_.parameters) offsets.push_back(place(at, parameter));
  program_.parameter_bytes = at;
  program_.parameters.assign(static_cast<std::size_t>(at) + 64, 0);
  const auto base = reinterpret_cast<u64>(program_.parameters.data());
  for (std::size_t n = 0; n < offsets.size(); ++n)
    symbols_[kernel_.parameters[n].name] = base + static_cast<u64>(offsets[n]);
  at = 0;
  for (const Variable& variable : kernel_.local) symbols_[variable.name] = static_cast<u64>(place(at, variable));
  program_.local_bytes = (at + 15) / 16 * 16;
  at = 0;
  std::vector<const Variable*> dynamic;
  for (const auto* list : {&kernel_.shared, &module.shared}) {
    for (const Variable& variable : *list) {
      if (variable.bytes == 0) {
        dynamic.push_back(&variable);
      } else {
        symbols_[variable.name] = static_cast<u64>(place(at, variable));
      }
    }
  }
  for (const Variable* variable : dynamic) {  // behind the others, all in one place
    s64 end = at;
    symbols_[variable->name] = static_cast<u64>(place(end, *variable));
    program_.shared_bytes = std::max(program_.shared_bytes, end);
  }
  program_.shared_bytes = std::max(program_.shared_bytes, at);
}

u32 Registers::reserve(std::size_t bytes, int poison) {
  const std::size_t start = (program_.file.size() + 63) / 64 * 64;
  program_.file.resize(start + bytes, static_cast<char>(poison));
  return static_cast<u32>(start);
}

void Registers::reserve_registers() {
  reserve(64);  // no slot is at 0
  for (const auto& [name, reg] : kernel_.registers)
    slots_[name] = reserve(reg.bytes == 0 ? 4 : static_cast<std::size_t>(reg.bytes) * kWarp);
  program_.thread_index = reserve(3 * 4 * kWarp);
  program_.block_index = reserve(3 * 4 * kWarp);
  program_.block_size = reserve(3 * 4 * kWarp);
  program_.grid_size = reserve(3 * 4 * kWarp);
  program_.lane = reserve(4 * kWarp);
}

// A constant in all lanes.
u32 Registers::constant(u64 value, int bytes) {
  const auto [found, fresh] = constants_.try_emplace({value, bytes}, 0);
  if (fresh) {
    found->second = reserve(static_cast<std::size_t>(bytes) * kWarp);
    for (int lane = 0; lane < kWarp; ++lane)
      std::memcpy(program_.file.data() + found->second + lane * bytes, &value, static_cast<std::size_t>(bytes));
  }
  return found->second;
}

u32 Registers::slot(const std::string& name, int bytes) const {
  const auto found = kernel_.registers.find(name);
  if (found == kernel_.registers.end() || found->second.bytes != bytes) throw UnsupportedPtx("register " + name);
  return slots_.at(name);
}

int Registers::width_of(const Argument& argument) const {
  const auto found = kernel_.registers.find(argument.name);
  return found == kernel_.registers.end() ? 0 : found->second.bytes;
}

// Slot of a source of `bytes` bytes: register, number, special register or address of a symbol.
u32 Registers::source(const Argument& argument, int bytes) {
  if (argument.kind == Argument::Kind::number) {
    if (argument.is_float && bytes != 4) throw UnsupportedPtx("operand " + argument.name);
    return constant(argument.number & (bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1), bytes);
  }
  if (argument.kind != Argument::Kind::name) throw UnsupportedPtx("operand " + argument.name);
  const std::string& name = argument.name;
  if (kernel_.registers.count(name) != 0) return slot(name, bytes);
  const auto special = [&](const char* prefix, u32 first) -> u32 {
    const std::size_t length = std::strlen(prefix);
    if (name.compare(0, length, prefix) != 0 || name.size() != length + 1) return 0;
    return first + static_cast<u32>(name[length] - 'x') * 4 * kWarp;
  };
  if (bytes == 4) {
    for (const u32 found : {special("%tid.", program_.thread_index), special("%ctaid.", program_.block_index),
                            special("%ntid.", program_.block_size), special("%nctaid.", program_.grid_size)}) {
      if (found != 0) return found;
    }
    if (name == "%laneid") return program_.lane;
  }
  const auto symbol = symbols_.find(name);
  if (symbol == symbols_.end()) throw UnsupportedPtx("operand " + argument.name);
  return constant(symbol->second + static_cast<u64>(argument.offset), bytes);
}

u32 Registers::target(const Argument& argument, int bytes) {
  if (argument.name == "_") return reserve(static_cast<std::size_t>(std::max(bytes, 1)) * kWarp);
  return slot(argument.name, bytes);
}

}  // namespace emulator
