// A thread block in execution: warps with a program counter per thread, as GPUs have had since Volta, and the checks of
// what a GPU would leave undefined.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "hazards.h"
#include "statistics.h"

namespace emulator {

constexpr int kWarp = 32;

struct Dimensions {
  unsigned x = 1, y = 1, z = 1;
  std::int64_t count() const { return static_cast<std::int64_t>(x) * y * z; }
};

struct Warp;
struct Instruction;
class Block;

using Handler = void (*)(Block&, Warp&, const Instruction&, std::uint32_t mask);

enum class Flow : std::uint8_t { next, branch, exit, barrier, warp_wide };
enum class Space : std::uint8_t { generic, global, shared, local, param };

// Operands are offsets into a warp's file: 32 numbers of their size each; predicates are a mask of lanes.
struct Instruction {
  Handler run = nullptr;
  Flow flow = Flow::next;
  Space space = Space::generic;
  bool guarded = false, guard_negated = false;
  bool wide_address = true;  // 64-bit address register
  std::uint8_t count = 1;    // numbers of a vector access
  std::uint8_t variant = 0;  // of an instruction: bits say which
  std::uint32_t guard = 0;
  std::array<std::uint32_t, 14> x{};
  std::int64_t offset = 0;  // of an address; a branch's target
  std::uint32_t lanes = 0;  // offset of the mask of a warp-wide instruction; 0: all lanes
  const struct Statement* statement = nullptr;
  Statistics::Kind kind = Statistics::other;
};

struct Program {
  std::string name;
  std::vector<Instruction> instructions;
  std::uint32_t file_bytes = 0;
  std::vector<char> file;  // initial registers: constants in place, the rest poison
  std::uint32_t thread_index = 0, block_index = 0, block_size = 0, grid_size = 0, lane = 0;  // slots, 3 in a row each
  std::int64_t shared_bytes = 0, local_bytes = 0, parameter_bytes = 0;
  std::vector<char> parameters;        // where instructions look for them
  std::vector<std::int64_t> executed;  // by warps, of each instruction, since it was last added up
};

struct Warp {
  int index = 0;
  char* file = nullptr;
  std::uint32_t alive = 0, waiting = 0, at_barrier = 0;  // waiting: for other lanes of the warp
  std::array<int, kWarp> pc{};
  unsigned epoch = 0;  // bar.warp.sync since the block's last barrier

  template <class T>
  T* at(std::uint32_t offset) {
    return reinterpret_cast<T*>(file + offset);
  }
  std::uint32_t& predicate(std::uint32_t offset) { return *at<std::uint32_t>(offset); }
};

// Calls f with each lane of a mask.
template <class F>
void each_lane(std::uint32_t mask, F f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

// What a GPU reports, or would leave undefined.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that kernels may use, by where it begins; empty: any.
struct Allowed {
  std::map<const char*, std::size_t> ranges;
  void add(const char* base, std::size_t bytes);
  bool holds(const char* address, std::size_t bytes) const;
};

class Block {
 public:
  Block(Program& program, Dimensions grid, Dimensions threads, std::int64_t dynamic_shared, const Allowed& allowed,
        Statistics& statistics);

  // One thread block from start to end; throws Fault.
  void run(Dimensions place);

  // What instructions use.
  char* address_of(Warp& warp, const Instruction& instruction, int lane);
  // Access of a lane to `bytes` at an address of the instruction's space: checked, as a host pointer.
  char* access(Warp& warp, const Instruction& instruction, int lane, char* address, int bytes, bool write);
  void count_access(char* const* addresses, std::uint32_t mask, int bytes);
  void begin_copy(Warp& warp, const Instruction& instruction, int lane, std::uint32_t target, const char* source,
                  int bytes, int valid);
  void commit_copies(Warp& warp, int lane);
  void wait_copies(Warp& warp, int lane, int pending);
  char* shared() { return shared_.data(); }
  bool in_shared(const char* address) const {
    return address >= shared_.data() && address < shared_.data() + shared_.size();
  }
  char* local(int thread) { return local_.data() + static_cast<std::size_t>(thread) * program_.local_bytes; }
  char* parameters() { return program_.parameters.data(); }
  [[noreturn]] void fault(Warp& warp, const Instruction& instruction, int lane, const std::string& what);

 private:
  struct Copy {
    std::uint32_t target;
    const char* source;
    int bytes, valid;
  };
  struct Copies {
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
  };

  Program& program_;
  Dimensions grid_, threads_, place_;
  int count_, warps_count_;
  const Allowed& allowed_;
  Statistics& statistics_;
  std::vector<char> shared_, local_, files_;
  std::vector<Warp> warps_;
  std::vector<Copies> copies_;
  Hazards hazards_;

  void begin(Dimensions place);
  void run_warp(Warp& warp);
  bool release_barrier();
  bool step_warp_wide(Warp& warp, const Instruction& instruction, std::uint32_t mask, int pc);
  [[noreturn]] void deadlock();
};

}  // namespace emulator
