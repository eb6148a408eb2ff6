// PTX as text: what a module declares, and the statements of its kernels, before they mean anything.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

// PTX this emulator cannot read or run.
struct UnsupportedPtx : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Argument {
  enum class Kind { name, number, memory, tuple };
  Kind kind = Kind::name;
  std::string name;             // register, symbol or label; of a memory operand, its base
  bool negated = false;         // !name
  std::uint64_t number = 0;     // integer, or the bits of a float
  bool is_float = false;        // 0f...: 32 bits
  std::int64_t offset = 0;      // of a memory operand or symbol
  std::vector<Argument> items;  // of a tuple {a, b}; of a pair a|b, the second
};

struct Statement {
  std::string guard;  // predicate register, or empty
  bool guard_negated = false;
  std::string opcode;              // up to the first dot
  std::vector<std::string> parts;  // what dots separate after it
  std::vector<Argument> arguments;
  std::string text;
  std::string place;  // "file:line" of the source where the compiler says it, else a line of the PTX

  std::string full_name() const;
  bool has(const char* part) const;
};

struct Variable {
  std::string name;
  int align = 1;
  std::int64_t bytes = 0;  // 0: as many as the launch gives (extern shared)
  std::vector<std::uint64_t> values;
  int element = 1;
};

// A register's class by the size of its numbers; predicates have none.
struct Register {
  int bytes = 0;
};

struct KernelText {
  std::string name;
  std::vector<Variable> parameters;
  std::vector<Variable> shared, local;
  std::map<std::string, Register> registers;  // of inner scopes under their scope's name
  std::vector<Statement> statements;
  std::map<std::string, int> labels;  // index of the statement that follows
};

struct ModuleText {
  std::vector<KernelText> kernels;
  std::vector<Variable> shared, constants;
};

// Throws UnsupportedPtx.
ModuleText parse(const std::string& ptx);

}  // namespace emulator
