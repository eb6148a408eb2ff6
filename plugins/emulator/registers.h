// The file of registers, constants and special registers of a kernel's warps, and where its variables lie.
#pragma once

#include <map>
#include <string>
#include <utility>

#include "machine.h"
#include "numbers.h"
#include "syntax.h"

namespace emulator {

class Registers {
 public:
  // Fills the file and sizes of `program`. All functions throw UnsupportedPtx.
  Registers(const KernelText& kernel, const ModuleText& module, const std::map<std::string, const char*>& constants,
            Program& program);

  bool has(const std::string& name) const;
  int width_of(const Argument& argument) const;  // bytes of a register; 0: it is none
  u32 slot(const std::string& name, int bytes) const;
  // Of a source of `bytes` bytes: register, number, special register or address of a symbol.
  u32 source(const Argument& argument, int bytes);
  u32 target(const Argument& argument, int bytes);
  u32 address(const std::string& symbol);  // of 64 bits, in all lanes
  u32 constant(u64 value, int bytes);      // in all lanes
  u32 reserve(std::size_t bytes, int poison = 0xa5);

 private:
  const KernelText& kernel_;
  Program& program_;
  std::map<std::string, u64> symbols_;  // addresses: absolute, or offsets of shared and local memory
  std::map<std::string, u32> slots_;
  std::map<std::pair<u64, int>, u32> constants_;

  void lay_out(const ModuleText& module);
  void reserve_registers();
};

}  // namespace emulator
