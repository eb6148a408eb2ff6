#include "hazards.h"

#include <algorithm>

namespace emulator {

Hazards::Hazards(std::size_t bytes) : writer_(bytes), reader_(bytes), other_reader_(bytes), copying_(bytes) {}

void Hazards::begin() {
  std::fill(writer_.begin(), writer_.end(), 0);
  std::fill(reader_.begin(), reader_.end(), 0);
  std::fill(other_reader_.begin(), other_reader_.end(), 0);
  std::fill(copying_.begin(), copying_.end(), 0);
  epoch_ = 1;
}

void Hazards::pass_barrier() {
  if (++epoch_ < 1u << 12) return;
  // Everything before this barrier is ordered; what was written stays known as written.
  epoch_ = 2;
  for (std::uint32_t& stamp : writer_) stamp = stamp == 0 ? 0 : 1u << 20;
  std::fill(reader_.begin(), reader_.end(), 0);
  std::fill(other_reader_.begin(), other_reader_.end(), 0);
}

const char* Hazards::read(std::size_t offset, int bytes, int thread, unsigned warp_epoch) {
  const std::uint32_t now = stamp(thread, warp_epoch);
  for (std::size_t i = offset; i < offset + bytes; ++i) {
    if (copying_[i]) return "reads what an asynchronous copy has not been waited for";
    if (writer_[i] == 0) return "reads shared memory that nobody has written";
    if (unordered(writer_[i], now)) return "reads what another thread wrote, with no barrier between";
    // Two readers are kept, of two warps where there are such.
    const std::uint32_t last = reader_[i];
    if (last == now) continue;
    if ((last & 1023u) / 32 != (now & 1023u) / 32 || last >> 20 != now >> 20) other_reader_[i] = last;
    reader_[i] = now;
  }
  return nullptr;
}

const char* Hazards::write(std::size_t offset, int bytes, int thread, unsigned warp_epoch) {
  const std::uint32_t now = stamp(thread, warp_epoch);
  for (std::size_t i = offset; i < offset + bytes; ++i) {
    if (copying_[i]) return "writes where an asynchronous copy has not been waited for";
    if (unordered(writer_[i], now)) return "writes where another thread wrote, with no barrier between";
    if (unordered(reader_[i], now) || unordered(other_reader_[i], now))
      return "writes what another thread reads, with no barrier between";
    writer_[i] = now;
  }
  return nullptr;
}

const char* Hazards::begin_copy(std::size_t offset, int bytes, int thread, unsigned warp_epoch) {
  const char* const hazard = write(offset, bytes, thread, warp_epoch);
  if (hazard == nullptr) std::fill_n(copying_.begin() + static_cast<std::ptrdiff_t>(offset), bytes, 1);
  return hazard;
}

void Hazards::end_copy(std::size_t offset, int bytes, int thread, unsigned warp_epoch) {
  std::fill_n(copying_.begin() + static_cast<std::ptrdiff_t>(offset), bytes, 0);
  std::fill_n(writer_.begin() + static_cast<std::ptrdiff_t>(offset), bytes, stamp(thread, warp_epoch));
}

}  // namespace emulator
