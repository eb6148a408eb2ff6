// Races in shared memory: two accesses to a byte, at least one of them a write, by two threads and with neither a
// barrier of the block nor, inside a warp, one of the warp between them.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

class Hazards {
 public:
  explicit Hazards(std::size_t bytes);

  void begin();         // of a thread block
  void pass_barrier();  // all threads of the block

  // What is wrong with an access, or null.
  const char* read(std::size_t offset, int bytes, int thread, unsigned warp_epoch);
  const char* write(std::size_t offset, int bytes, int thread, unsigned warp_epoch);
  // An asynchronous copy under way: nobody may touch its bytes before its thread has waited for it.
  const char* begin_copy(std::size_t offset, int bytes, int thread, unsigned warp_epoch);
  void end_copy(std::size_t offset, int bytes, int thread, unsigned warp_epoch);
  // The other thread of the last hazard found.
  int other() const { return other_; }

 private:
  // Stamp: barriers passed (12 bits), the warp's own barriers since (10), thread (10). 0: never.
  std::vector<std::uint32_t> writer_, reader_, other_reader_;
  std::vector<std::uint8_t> copying_;
  std::uint32_t epoch_ = 1;
  int other_ = 0;

  std::uint32_t stamp(int thread, unsigned warp_epoch) const {
    return epoch_ << 20 | (warp_epoch & 1023u) << 10 | static_cast<std::uint32_t>(thread);
  }
  bool unordered(std::uint32_t before, std::uint32_t now) {
    if (before >> 20 != now >> 20 || (before & 1023u) == (now & 1023u)) return false;
    const bool same_warp = (before & 1023u) / 32 == (now & 1023u) / 32;
    if (same_warp && (before >> 10 & 1023u) != (now >> 10 & 1023u)) return false;
    other_ = static_cast<int>(before & 1023u);
    return true;
  }
};

}  // namespace emulator
