// What a kernel did, summed over its launches: the figures a profiler would give that do not need a clock.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace emulator {

struct Statistics {
  enum Kind { integer, floating, conversion, special, tensor, shuffle, memory, control, other, kinds };

  std::int64_t launches = 0, blocks = 0;
  std::int64_t shared_bytes = 0;          // of a thread block, at most
  std::int64_t instructions[kinds] = {};  // of warps
  std::int64_t lanes = 0;                 // threads that took part in them
  std::int64_t shared_accesses = 0, shared_wavefronts = 0, shared_ideal = 0;
  std::int64_t global_accesses = 0, global_sectors = 0, global_bytes = 0;  // sectors of 32 bytes

  std::map<std::string, std::int64_t> places;  // instructions of warps by the line of the source

  std::string json() const;
};

}  // namespace emulator
