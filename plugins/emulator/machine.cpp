#include "machine.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <sstream>

#include "syntax.h"

namespace emulator {

void Allowed::add(const char* base, std::size_t bytes) {
  // What lay here before has been freed.
  auto range = ranges.lower_bound(base);
  if (range != ranges.begin() && std::prev(range)->first + std::prev(range)->second > base) --range;
  while (range != ranges.end() && range->first < base + bytes) range = ranges.erase(range);
  ranges[base] = bytes;
}

bool Allowed::holds(const char* address, std::size_t bytes) const {
  if (ranges.empty()) return true;
  auto range = ranges.upper_bound(address);
  if (range == ranges.begin()) return false;
  --range;
  return address + bytes <= range->first + range->second;
}

Block::Block(Program& program, Dimensions grid, Dimensions threads, std::int64_t dynamic_shared, const Allowed& allowed,
             Statistics& statistics)
    : program_(program),
      grid_(grid),
      threads_(threads),
      count_(static_cast<int>(threads.count())),
      warps_count_((count_ + kWarp - 1) / kWarp),
      allowed_(allowed),
      statistics_(statistics),
      shared_(static_cast<std::size_t>(program.shared_bytes + dynamic_shared)),
      local_(static_cast<std::size_t>(program.local_bytes) * warps_count_ * kWarp),
      files_(static_cast<std::size_t>(program.file_bytes) * warps_count_),
      warps_(warps_count_),
      copies_(static_cast<std::size_t>(warps_count_) * kWarp),
      hazards_(shared_.size()) {
  for (int w = 0; w < warps_count_; ++w) {
    Warp& warp = warps_[w];
    warp.index = w;
    warp.file = files_.data() + static_cast<std::size_t>(program.file_bytes) * w;
    std::memcpy(warp.file, program.file.data(), program.file_bytes);
    std::uint32_t* const thread = warp.at<std::uint32_t>(program.thread_index);
    std::uint32_t* const size = warp.at<std::uint32_t>(program.block_size);
    std::uint32_t* const total = warp.at<std::uint32_t>(program.grid_size);
    for (int lane = 0; lane < kWarp; ++lane) {
      const unsigned index = static_cast<unsigned>(w * kWarp + lane);
      thread[lane] = index % threads.x;
      thread[kWarp + lane] = index / threads.x % threads.y;
      thread[2 * kWarp + lane] = index / threads.x / threads.y;
      warp.at<std::uint32_t>(program.lane)[lane] = static_cast<unsigned>(lane);
      const unsigned sizes[3] = {threads.x, threads.y, threads.z}, totals[3] = {grid.x, grid.y, grid.z};
      for (int axis = 0; axis < 3; ++axis) {
        size[axis * kWarp + lane] = sizes[axis];
        total[axis * kWarp + lane] = totals[axis];
      }
    }
  }
}

void Block::begin(Dimensions place) {
  place_ = place;
  std::memset(shared_.data(), 0xff, shared_.size());
  std::memset(local_.data(), 0xff, local_.size());
  hazards_.begin();
  for (Copies& copies : copies_) copies = {};
  for (Warp& warp : warps_) {
    const int lanes = std::min(kWarp, count_ - warp.index * kWarp);
    warp.alive = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    warp.waiting = warp.at_barrier = 0;
    warp.pc.fill(0);
    warp.epoch = 0;
    const unsigned places[3] = {place.x, place.y, place.z};
    for (int axis = 0; axis < 3; ++axis)
      std::fill_n(warp.at<std::uint32_t>(program_.block_index) + axis * kWarp, kWarp, places[axis]);
  }
}

void Block::run(Dimensions place) {
  begin(place);
  ++statistics_.blocks;
  while (true) {
    bool done = true;
    for (Warp& warp : warps_) {
      run_warp(warp);
      done = done && warp.alive == 0;
    }
    if (done) break;
    if (!release_barrier()) deadlock();
  }
  for (const Copies& copies : copies_) {
    const bool pending = std::any_of(copies.groups.begin(), copies.groups.end(), [](auto& g) { return !g.empty(); });
    if (!copies.open.empty() || pending) {
      throw Fault(program_.name + ": a thread ends before an asynchronous copy it began, and never waits for it");
    }
  }
}

// Threads that have ended count as arrived.
bool Block::release_barrier() {
  for (const Warp& warp : warps_) {
    if ((warp.alive & ~warp.at_barrier) != 0) return false;
  }
  hazards_.pass_barrier();
  for (Warp& warp : warps_) {
    warp.at_barrier = 0;
    warp.epoch = 0;
  }
  return true;
}

void Block::deadlock() {
  std::ostringstream out;
  out << program_.name << ": threads wait for one another for ever; warp";
  for (const Warp& warp : warps_) {
    if (warp.alive == 0) continue;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((warp.alive >> lane & 1u) == 0) continue;
      out << ' ' << warp.index << " at " << program_.instructions[warp.pc[lane]].statement->place << " ("
          << program_.instructions[warp.pc[lane]].statement->full_name() << ", lanes " << std::hex << warp.alive
          << ", waiting " << warp.waiting << ", at a barrier " << warp.at_barrier << std::dec << ");";
      break;
    }
  }
  throw Fault(out.str());
}

// Runs threads until each has ended or waits. Of those that may run, the ones with the least program counter go first:
// threads that took different branches meet again where the branches do.
void Block::run_warp(Warp& warp) {
  const Instruction* const code = program_.instructions.data();
  while (true) {
    const std::uint32_t ready = warp.alive & ~warp.waiting & ~warp.at_barrier;
    if (ready == 0) return;
    int pc = INT_MAX, next = INT_MAX;  // of the chosen threads, and the least one of the others
    for (int lane = 0; lane < kWarp; ++lane) {
      if (ready >> lane & 1u) pc = std::min(pc, warp.pc[lane]);
    }
    std::uint32_t active = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((ready >> lane & 1u) == 0) continue;
      if (warp.pc[lane] == pc) {
        active |= 1u << lane;
      } else {
        next = std::min(next, warp.pc[lane]);
      }
    }
    auto move = [&](std::uint32_t lanes, int to) {
      for (int lane = 0; lane < kWarp; ++lane) {
        if (lanes >> lane & 1u) warp.pc[lane] = to;
      }
    };
    const int active_count = __builtin_popcount(active);
    for (bool together = true; together;) {
      const Instruction& instruction = code[pc];
      std::uint32_t mask = active;
      if (instruction.guarded) {
        const std::uint32_t condition = warp.predicate(instruction.guard);
        mask &= instruction.guard_negated ? ~condition : condition;
      }
      ++statistics_.instructions[instruction.kind];
      ++program_.executed[static_cast<std::size_t>(pc)];
      statistics_.lanes += active_count;
      switch (instruction.flow) {
        case Flow::next:
          if (mask != 0) instruction.run(*this, warp, instruction, mask);
          ++pc;
          break;
        case Flow::branch:
          if (mask == active) {
            pc = static_cast<int>(instruction.offset);
          } else if (mask == 0) {
            ++pc;
          } else {
            move(mask, static_cast<int>(instruction.offset));
            move(active & ~mask, pc + 1);
            together = false;
          }
          break;
        case Flow::exit:
          warp.alive &= ~mask;
          move(active & ~mask, pc + 1);
          together = false;
          break;
        case Flow::barrier:
          if (mask != active && mask != 0)
            fault(warp, instruction, __builtin_ctz(active), "a barrier under a condition");
          warp.at_barrier |= mask;
          move(active, pc + 1);
          together = false;
          break;
        case Flow::warp_wide:
          if (mask != 0) {
            together = step_warp_wide(warp, instruction, mask, pc);
            if (!together) move(active & ~mask, pc + 1);
          }
          ++pc;
          break;
      }
      if (together && pc >= next) {
        move(active, pc);
        together = false;
      }
    }
  }
}

// Runs the instruction once all its lanes have reached it; until then they wait. True if the active lanes, which are
// then all of them, go on together.
bool Block::step_warp_wide(Warp& warp, const Instruction& instruction, std::uint32_t mask, int pc) {
  const std::uint32_t wanted =
      instruction.lanes == 0 ? ~0u : warp.at<std::uint32_t>(instruction.lanes)[__builtin_ctz(mask)];
  const std::uint32_t present = count_ - warp.index * kWarp >= kWarp ? ~0u : (1u << (count_ % kWarp)) - 1;
  if ((wanted & mask) != mask || (wanted & ~(warp.alive & present)) != 0) {
    fault(warp, instruction, __builtin_ctz(mask),
          "lanes that have ended, or that it does not name, are due at an instruction of the whole warp");
  }
  std::uint32_t arrived = mask;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((warp.waiting >> lane & 1u) != 0 && warp.pc[lane] == pc) arrived |= 1u << lane;
  }
  if ((arrived & wanted) != wanted) {
    warp.waiting |= mask;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1u) warp.pc[lane] = pc;
    }
    return false;
  }
  instruction.run(*this, warp, instruction, wanted);
  if (arrived == mask) return true;
  warp.waiting &= ~arrived;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (arrived >> lane & 1u) warp.pc[lane] = pc + 1;
  }
  return false;
}

void Block::fault(Warp& warp, const Instruction& instruction, int lane, const std::string& what) {
  std::ostringstream out;
  out << program_.name << ": thread " << warp.index * kWarp + lane << " of block (" << place_.x << ", " << place_.y
      << ", " << place_.z << ") " << what << "; " << instruction.statement->place << ": "
      << instruction.statement->text;
  throw Fault(out.str());
}

char* Block::address_of(Warp& warp, const Instruction& instruction, int lane) {
  const std::uint32_t slot = instruction.x[12];
  // Addresses of 32 bits wrap around in 32 bits.
  const std::uint64_t address =
      instruction.wide_address ? warp.at<std::uint64_t>(slot)[lane] + static_cast<std::uint64_t>(instruction.offset)
                               : static_cast<std::uint32_t>(warp.at<std::uint32_t>(slot)[lane] +
                                                            static_cast<std::uint64_t>(instruction.offset));
  switch (instruction.space) {
    case Space::shared:
      return shared_.data() + static_cast<std::int64_t>(address);
    case Space::local:
      return local(warp.index * kWarp + lane) + static_cast<std::int64_t>(address);
    default:
      return reinterpret_cast<char*>(address);
  }
}

char* Block::access(Warp& warp, const Instruction& instruction, int lane, char* address, int bytes, bool write) {
  const int thread = warp.index * kWarp + lane;
  const bool own_local = address >= local(thread) && address + bytes <= local(thread) + program_.local_bytes;
  const bool shared = instruction.space == Space::shared || in_shared(address);
  const auto place = shared                              ? address - shared_.data()
                     : instruction.space == Space::local ? address - local(thread)
                                                         : 0;
  const std::int64_t distance = shared || instruction.space == Space::local
                                    ? static_cast<std::int64_t>(place)
                                    : static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address));
  if (distance % bytes != 0)
    fault(warp, instruction, lane, "uses an address that is not aligned to " + std::to_string(bytes) + " bytes");
  if (shared) {
    if (place < 0 || place + bytes > static_cast<std::int64_t>(shared_.size())) {
      fault(warp, instruction, lane,
            "uses byte " + std::to_string(place) + " of " + std::to_string(shared_.size()) + " of shared memory");
    }
    const char* const hazard = write ? hazards_.write(static_cast<std::size_t>(place), bytes, thread, warp.epoch)
                                     : hazards_.read(static_cast<std::size_t>(place), bytes, thread, warp.epoch);
    if (hazard != nullptr) {
      fault(warp, instruction, lane,
            std::string(hazard) + " (thread " + std::to_string(hazards_.other()) + ", byte " + std::to_string(place) +
                " of shared memory)");
    }
    return address;
  }
  if (own_local) return address;
  if (instruction.space == Space::local) fault(warp, instruction, lane, "leaves its local memory");
  const std::vector<char>& parameters = program_.parameters;
  if (address >= parameters.data() && address + bytes <= parameters.data() + parameters.size()) {
    if (write) fault(warp, instruction, lane, "writes to its parameters");
    return address;
  }
  if (!allowed_.holds(address, static_cast<std::size_t>(bytes))) {
    std::ostringstream out;
    out << (write ? "writes" : "reads") << ' ' << bytes << " bytes at " << static_cast<void*>(address)
        << ", outside of every tensor";
    fault(warp, instruction, lane, out.str());
  }
  return address;
}

void Block::count_access(char* const* addresses, std::uint32_t mask, int bytes) {
  char* const first = addresses[__builtin_ctz(mask)];
  if (in_shared(first)) {
    // Lanes are served in groups of 128 bytes; a group takes as many turns as a bank has words to give.
    const int lanes = std::max(1, std::min(kWarp, 128 / std::max(bytes, 4)));
    ++statistics_.shared_accesses;
    for (int group = 0; group < kWarp; group += lanes) {
      std::int64_t words[32][32];
      int counts[32] = {}, turns = 0;
      for (int lane = group; lane < group + lanes; ++lane) {
        if ((mask >> lane & 1u) == 0) continue;
        for (int byte = 0; byte < bytes; byte += 4) {
          const std::int64_t word = (addresses[lane] - shared_.data() + byte) / 4;
          const int bank = static_cast<int>(word % 32);
          if (std::find(words[bank], words[bank] + counts[bank], word) != words[bank] + counts[bank]) continue;
          if (counts[bank] < 32) words[bank][counts[bank]++] = word;
          turns = std::max(turns, counts[bank]);
        }
      }
      statistics_.shared_wavefronts += turns;
      statistics_.shared_ideal += turns > 0;
    }
    return;
  }
  std::uintptr_t sectors[kWarp * 2];
  int count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    const std::uintptr_t sector = reinterpret_cast<std::uintptr_t>(addresses[lane]) / 32;
    if (std::find(sectors, sectors + count, sector) == sectors + count) sectors[count++] = sector;
    statistics_.global_bytes += bytes;
  }
  ++statistics_.global_accesses;
  statistics_.global_sectors += count;
}

void Block::begin_copy(Warp& warp, const Instruction& instruction, int lane, std::uint32_t target, const char* source,
                       int bytes, int valid) {
  const int thread = warp.index * kWarp + lane;
  if (target % static_cast<unsigned>(bytes) != 0 ||
      reinterpret_cast<std::uintptr_t>(source) % static_cast<unsigned>(bytes) != 0)
    fault(warp, instruction, lane, "copies asynchronously from or to an address that is not aligned");
  if (static_cast<std::size_t>(target) + static_cast<std::size_t>(bytes) > shared_.size())
    fault(warp, instruction, lane, "copies asynchronously to byte " + std::to_string(target) + " of shared memory");
  if (valid > 0 && !allowed_.holds(source, static_cast<std::size_t>(valid)))
    fault(warp, instruction, lane, "copies asynchronously from outside of every tensor");
  const char* const hazard = hazards_.begin_copy(target, bytes, thread, warp.epoch);
  if (hazard != nullptr) {
    fault(warp, instruction, lane,
          std::string(hazard) + " (thread " + std::to_string(hazards_.other()) + ", byte " + std::to_string(target) +
              " of shared memory)");
  }
  copies_[thread].open.push_back({target, source, bytes, valid});
}

void Block::commit_copies(Warp& warp, int lane) {
  Copies& copies = copies_[warp.index * kWarp + lane];
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

// Data arrives as late as it may: when its thread waits for it.
void Block::wait_copies(Warp& warp, int lane, int pending) {
  const int thread = warp.index * kWarp + lane;
  Copies& copies = copies_[thread];
  while (static_cast<int>(copies.groups.size()) > pending) {
    for (const Copy& copy : copies.groups.front()) {
      char* const target = shared_.data() + copy.target;
      std::memset(target, 0, static_cast<std::size_t>(copy.bytes));
      if (copy.valid > 0) std::memcpy(target, copy.source, static_cast<std::size_t>(copy.valid));
      hazards_.end_copy(copy.target, copy.bytes, thread, warp.epoch);
    }
    copies.groups.erase(copies.groups.begin());
  }
}

}  // namespace emulator
