#include "decode.h"

#include <algorithm>
#include <cstring>

#include "effects.h"
#include "elementwise.h"
#include "lanes.h"
#include "registers.h"

namespace emulator {
namespace {

class Decoder {
 public:
  Decoder(const KernelText& kernel, const ModuleText& module, const std::map<std::string, const char*>& constants)
      : kernel_(kernel), program_(std::make_unique<Program>()), registers_(kernel, module, constants, *program_) {
    program_->name = kernel.name;
  }

  std::unique_ptr<Program> run() {
    program_->instructions.reserve(kernel_.statements.size() + 1);
    for (const Statement& statement : kernel_.statements) {
      statement_ = &statement;
      Instruction i;
      i.statement = &statement;
      if (!statement.guard.empty()) {
        i.guarded = true;
        i.guard_negated = statement.guard_negated;
        i.guard = slot(statement.guard, 0);
      }
      decode_named(i);
      program_->instructions.push_back(i);
    }
    if (!kernel_.statements.empty()) {  // a kernel ends where its text does
      Instruction end;
      end.statement = &kernel_.statements.back();
      end.flow = Flow::exit;
      program_->instructions.push_back(end);
    }
    program_->executed.assign(program_->instructions.size(), 0);
    program_->file_bytes = static_cast<u32>(program_->file.size());
    return std::move(program_);
  }

 private:
  const KernelText& kernel_;
  std::unique_ptr<Program> program_;
  Registers registers_;
  const Statement* statement_ = nullptr;

  [[noreturn]] void unsupported() const { throw UnsupportedPtx("not emulated"); }

  u32 reserve(std::size_t bytes) { return registers_.reserve(bytes); }
  u32 constant(u64 value, int bytes) { return registers_.constant(value, bytes); }
  u32 slot(const std::string& name, int bytes) const { return registers_.slot(name, bytes); }
  int width_of(const Argument& argument) const { return registers_.width_of(argument); }
  u32 source(const Argument& argument, int bytes) { return registers_.source(argument, bytes); }
  u32 target(const Argument& argument, int bytes) { return registers_.target(argument, bytes); }

  const Argument& argument(std::size_t n) const {
    if (n >= statement_->arguments.size()) unsupported();
    return statement_->arguments[n];
  }

  // Targets and sources of the same size, in order.
  void operands(Instruction& i, int bytes) {
    for (std::size_t n = 0; n < statement_->arguments.size(); ++n)
      i.x[n] = n == 0 ? target(argument(0), bytes) : source(argument(n), bytes);
  }

  Type last_type() const {
    const Type type = statement_->parts.empty() ? Type::none : type_of(statement_->parts.back());
    if (type == Type::none) unsupported();
    return type;
  }

  // Errors name the statement.
  void decode_named(Instruction& i) {
    try {
      decode(i);
    } catch (const UnsupportedPtx& error) {
      throw UnsupportedPtx(kernel_.name + ": " + statement_->text + " (" + error.what() + ")");
    }
  }

  void decode(Instruction& i) {
    const std::string& op = statement_->opcode;
    if (op == "bra") {
      const auto label = kernel_.labels.find(argument(0).name);
      if (label == kernel_.labels.end()) unsupported();
      i.flow = Flow::branch;
      i.offset = label->second;
      i.kind = Statistics::control;
    } else if (op == "ret" || op == "exit") {
      i.flow = Flow::exit;
      i.kind = Statistics::control;
    } else if (op == "bar" || op == "barrier") {
      decode_barrier(i);
    } else if (op == "ld" || op == "st") {
      decode_memory(i, op == "ld");
    } else if (op == "cp") {
      decode_copy(i);
    } else if (op == "shfl") {
      decode_shuffle(i);
    } else if (op == "ldmatrix") {
      decode_matrices(i);
    } else if (op == "mma") {
      decode_product(i);
    } else if (op == "setp") {
      decode_comparison(i);
    } else if (op == "cvt") {
      decode_conversion(i);
    } else if (op == "cvta") {
      decode_address(i);
    } else if (op == "mov") {
      decode_move(i);
    } else if (last_type() == Type::pred) {
      decode_logic(i);
    } else {
      decode_arithmetic(i);
    }
    if (i.flow == Flow::next && i.run == nullptr) unsupported();
  }

  void decode_barrier(Instruction& i) {
    i.kind = Statistics::control;
    if (statement_->has("warp")) {
      i.flow = Flow::warp_wide;
      i.run = warp_barrier;
      i.lanes = source(argument(0), 4);
      return;
    }
    const Argument& which = argument(0);
    if (!statement_->has("sync") || statement_->arguments.size() != 1 || which.kind != Argument::Kind::number ||
        which.number != 0)
      unsupported();
    i.flow = Flow::barrier;
  }

  void set_address(Instruction& i, const Argument& place) {
    if (place.kind != Argument::Kind::memory) unsupported();
    i.offset = place.offset;
    i.wide_address = true;
    if (place.name.empty()) {
      i.x[12] = constant(0, 8);
    } else if (registers_.has(place.name)) {
      const int width = width_of(place);
      if (width != 4 && width != 8) unsupported();
      i.wide_address = width == 8;
      i.x[12] = slot(place.name, width);
    } else {
      i.x[12] = registers_.address(place.name);
    }
  }

  void decode_memory(Instruction& i, bool is_load) {
    static const std::map<std::string, Space> spaces = {{"global", Space::global},
                                                        {"shared", Space::shared},
                                                        {"local", Space::local},
                                                        {"param", Space::param},
                                                        {"const", Space::global}};
    i.kind = Statistics::memory;
    const Type type = last_type();
    for (const std::string& part : statement_->parts) {
      const auto space = spaces.find(part);
      if (space != spaces.end()) {
        i.space = space->second;
      } else if (part == "v2" || part == "v4") {
        i.count = part == "v2" ? 2 : 4;
      } else if (part != "nc" && part != "volatile" && part != "weak" && part != "relaxed" && part != "gpu" &&
                 type_of(part) == Type::none) {
        unsupported();
      }
    }
    set_address(i, argument(is_load ? 1 : 0));
    const Argument& data = argument(is_load ? 0 : 1);
    const std::vector<Argument> one = {data};
    const std::vector<Argument>& list = data.kind == Argument::Kind::tuple ? data.items : one;
    if (list.size() != i.count) unsupported();
    int width = bytes_of(type);
    for (const Argument& item : list) {
      if (registers_.has(item.name)) width = width_of(item);
    }
    for (std::size_t n = 0; n < list.size(); ++n) i.x[n] = is_load ? target(list[n], width) : source(list[n], width);
    i.x[8] = static_cast<u32>(bytes_of(type));
    i.x[9] = static_cast<u32>(width);
    i.variant = is_signed(type);
    i.run = is_load ? load : store;
  }

  void decode_copy(Instruction& i) {
    i.kind = Statistics::memory;
    if (statement_->has("commit_group")) {
      i.run = commit_copies;
    } else if (statement_->has("wait_group")) {
      i.x[0] = static_cast<u32>(argument(0).number);
      i.run = wait_copies;
    } else if (statement_->has("wait_all")) {
      unsupported();
    } else {
      const Argument& to = argument(0);
      const int width = width_of(to);
      set_address(i, argument(1));
      i.x[0] = width == 0 ? source(to, 4) : slot(to.name, width);
      i.x[2] = static_cast<u32>(static_cast<s32>(to.offset));
      i.x[8] = static_cast<u32>(argument(2).number);
      i.variant = width == 8;
      if (statement_->arguments.size() > 3) {
        i.x[1] = source(argument(3), 4);
        i.variant |= 2;
      }
      i.run = copy_async;
    }
  }

  void decode_shuffle(Instruction& i) {
    static const std::map<std::string, int> modes = {{"bfly", 0}, {"idx", 1}, {"up", 2}, {"down", 3}};
    i.kind = Statistics::shuffle;
    const auto mode = modes.find(statement_->parts.at(1));
    if (mode == modes.end()) unsupported();
    i.variant = static_cast<std::uint8_t>(mode->second);
    i.x[0] = target(argument(0), 4);
    if (!argument(0).items.empty()) {
      i.x[4] = target(argument(0).items[0], 0);
      i.variant |= 4;
    }
    for (std::size_t n = 1; n < 4; ++n) i.x[n] = source(argument(n), 4);
    i.flow = Flow::warp_wide;
    i.lanes = source(argument(4), 4);
    i.run = shuffle;
  }

  void decode_matrices(Instruction& i) {
    i.kind = Statistics::memory;
    i.count = statement_->has("x4") ? 4 : statement_->has("x2") ? 2 : 1;
    i.variant = statement_->has("trans");
    i.space = statement_->has("shared") ? Space::shared : Space::generic;
    if (!statement_->has("m8n8") || argument(0).items.size() != i.count) unsupported();
    for (std::size_t n = 0; n < i.count; ++n) i.x[n] = target(argument(0).items[n], 4);
    set_address(i, argument(1));
    i.flow = Flow::warp_wide;
    i.run = load_matrices;
  }

  void decode_product(Instruction& i) {
    i.kind = Statistics::tensor;
    if (!statement_->has("m16n8k16") || statement_->parts.at(5) != "f32" || statement_->parts.back() != "f32")
      unsupported();
    const std::size_t sizes[] = {4, 4, 2, 4};
    u32 n = 0;
    for (std::size_t part = 0; part < 4; ++part) {
      if (argument(part).items.size() != sizes[part]) unsupported();
      for (const Argument& item : argument(part).items) i.x[n++] = part == 0 ? target(item, 4) : source(item, 4);
    }
    i.flow = Flow::warp_wide;
    const std::string& operand = statement_->parts.at(6);
    i.run = operand == "f16" ? multiply_halves : operand == "bf16" ? multiply_bfloats : nullptr;
    if (i.run == nullptr || statement_->parts.at(7) != operand) unsupported();
  }

  void decode_comparison(Instruction& i) {
    const Type type = last_type();
    i.kind = is_float(type) ? Statistics::floating : Statistics::integer;
    i.x[0] = target(argument(0), 0);
    if (!argument(0).items.empty()) {
      i.x[3] = target(argument(0).items[0], 0);
      i.variant = 1;
    }
    i.x[1] = source(argument(1), bytes_of(type));
    i.x[2] = source(argument(2), bytes_of(type));
    if (statement_->arguments.size() != 3) unsupported();
    i.run = comparison(statement_->parts.at(0), type);
  }

  void decode_conversion(Instruction& i) {
    i.kind = Statistics::conversion;
    const Type from = last_type(), to = type_of(statement_->parts.at(statement_->parts.size() - 2));
    const std::string rounding = statement_->parts.size() > 2 ? statement_->parts[0] : "";
    for (std::size_t n = 0; n + 2 < statement_->parts.size(); ++n) {
      const std::string& part = statement_->parts[n];
      if (n > 0 && part != "ftz") unsupported();
    }
    if (to == Type::f16x2 || to == Type::bf16x2) {
      if (rounding != "rn") unsupported();
      operands(i, 4);
      i.run = pair_conversion(to);
      return;
    }
    const int width = width_of(argument(0));
    const int held = argument(1).kind == Argument::Kind::number ? bytes_of(from) : width_of(argument(1));
    const bool narrows = is_float(from) || is_float(to);
    if (width < bytes_of(to) || held < bytes_of(from) || (narrows && width != bytes_of(to)) ||
        (is_float(from) && held != bytes_of(from)))
      unsupported();
    i.x[0] = target(argument(0), width);
    i.x[1] = source(argument(1), held);
    i.run = conversion(to, from, rounding, width, held);
  }

  void decode_address(Instruction& i) {
    i.kind = Statistics::integer;
    if (last_type() != Type::u64) unsupported();
    operands(i, 8);
    const bool to = statement_->has("to");
    if (statement_->has("shared")) {
      i.run = to ? to_shared : from_shared;
    } else if (statement_->has("local")) {
      i.run = to ? to_local : from_local;
    } else {
      i.run = apply<u64, u64>([](u64 x) { return x; });
    }
  }

  void decode_move(Instruction& i) {
    i.kind = Statistics::other;
    const Type type = last_type();
    const Argument &to = argument(0), &from = argument(1);
    if (type == Type::pred) {
      decode_logic(i);
    } else if (to.kind == Argument::Kind::tuple) {
      const int half = bytes_of(type) / 2;
      if (to.items.size() != 2) unsupported();
      i.x[0] = target(to.items[0], half);
      i.x[3] = target(to.items[1], half);
      i.x[1] = source(from, 2 * half);
      i.run = half == 2 ? split<u16, u32> : half == 4 ? split<u32, u64> : nullptr;
    } else if (from.kind == Argument::Kind::tuple) {
      const int half = bytes_of(type) / 2;
      if (from.items.size() != 2) unsupported();
      i.x[0] = target(to, 2 * half);
      i.x[1] = source(from.items[0], half);
      i.x[2] = source(from.items[1], half);
      i.run = half == 2   ? apply<u32, u16, u16>([](u16 low, u16 high) { return low | static_cast<u32>(high) << 16; })
              : half == 4 ? apply<u64, u32, u32>([](u32 low, u32 high) { return low | static_cast<u64>(high) << 32; })
                          : nullptr;
    } else {
      operands(i, bytes_of(type));
      i.run = bytes_of(type) == 2   ? apply<u16, u16>([](u16 x) { return x; })
              : bytes_of(type) == 4 ? apply<u32, u32>([](u32 x) { return x; })
                                    : apply<u64, u64>([](u64 x) { return x; });
    }
  }

  template <class Half, class Whole>
  static void split(Block&, Warp& warp, const Instruction& i, u32 mask) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      const Whole x = warp.at<Whole>(i.x[1])[lane];
      warp.at<Half>(i.x[0])[lane] = static_cast<Half>(x);
      warp.at<Half>(i.x[3])[lane] = static_cast<Half>(x >> 8 * sizeof(Half));
    }
  }

  void decode_logic(Instruction& i) {
    i.kind = Statistics::integer;
    i.x[0] = target(argument(0), 0);
    for (std::size_t n = 1; n < statement_->arguments.size(); ++n) {
      const Argument& from = argument(n);
      if (from.kind == Argument::Kind::number) {
        const u32 place = reserve(4);
        const u32 value = from.number != 0 ? ~0u : 0u;
        std::memcpy(program_->file.data() + place, &value, 4);
        i.x[n] = place;
      } else {
        i.x[n] = slot(from.name, 0);
        if (from.negated) i.variant |= static_cast<std::uint8_t>(1u << n);
      }
    }
    if (statement_->arguments.size() == 2) i.x[2] = i.x[1];
    i.run = logic(statement_->opcode);
  }

  void decode_arithmetic(Instruction& i) {
    const std::string& op = statement_->opcode;
    const Type type = last_type();
    const bool special = op == "ex2" || op == "rcp" || op == "sqrt" || op == "rsqrt" || op == "sin" || op == "cos";
    const bool floating = is_float(type) || type == Type::f16x2 || type == Type::bf16x2;
    i.kind = special ? Statistics::special : floating ? Statistics::floating : Statistics::integer;
    if (op == "selp") {
      i.kind = Statistics::integer;
      const int bytes = bytes_of(type);
      i.x[0] = target(argument(0), bytes);
      i.x[1] = source(argument(1), bytes);
      i.x[2] = source(argument(2), bytes);
      i.x[3] = slot(argument(3).name, 0);
      i.run = selection(type);
    } else if (op == "shl" || op == "shr") {
      decode_shift(i, type);
    } else if ((op == "mul" || op == "mad") && !is_float(type) && type != Type::f16x2) {
      decode_product_of_integers(i, type);
    } else if (op == "bfi" || op == "bfe") {
      decode_field(i, type);
    } else if (op == "lop3") {
      decode_lookup(i);
    } else {
      if (op == "clz" || op == "popc") {
        i.x[0] = target(argument(0), 4);
        i.x[1] = source(argument(1), bytes_of(type));
      } else {
        operands(i, bytes_of(type));
      }
      i.run = elementwise(*statement_, type);
    }
  }

  void decode_shift(Instruction& i, Type type) {
    const int bytes = bytes_of(type);
    i.x[0] = target(argument(0), bytes);
    i.x[1] = source(argument(1), bytes);
    i.x[2] = source(argument(2), 4);
    i.run = shift(type, statement_->opcode == "shl");
  }

  void decode_product_of_integers(Instruction& i, Type type) {
    const int bytes = bytes_of(type), result = statement_->has("wide") ? 2 * bytes : bytes;
    i.x[0] = target(argument(0), result);
    i.x[1] = source(argument(1), bytes);
    i.x[2] = source(argument(2), bytes);
    i.x[3] = statement_->opcode == "mad" ? source(argument(3), result) : constant(0, result);
    i.run = product(*statement_, type);
  }

  void decode_field(Instruction& i, Type type) {
    const bool inserts = statement_->opcode == "bfi";
    const int bytes = bytes_of(type);
    i.x[0] = target(argument(0), bytes);
    i.x[1] = source(argument(1), bytes);
    if (inserts) i.x[2] = source(argument(2), bytes);
    const std::size_t first = inserts ? 3 : 2;
    i.x[first] = source(argument(first), 4);
    i.x[first + 1] = source(argument(first + 1), 4);
    i.run = bit_field(type, inserts);
  }

  void decode_lookup(Instruction& i) {
    i.x[0] = target(argument(0), 4);
    for (std::size_t n = 1; n < 4; ++n) i.x[n] = source(argument(n), 4);
    i.x[4] = static_cast<u32>(argument(4).number);
    i.run = lookup_of_three();
  }
};

}  // namespace

std::unique_ptr<Program> decode(const KernelText& kernel, const ModuleText& module,
                                const std::map<std::string, const char*>& constants) {
  return Decoder(kernel, module, constants).run();
}

}  // namespace emulator
