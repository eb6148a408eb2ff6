#include "statistics.h"

#include <sstream>

namespace emulator {

std::string Statistics::json() const {
  static const char* const names[kinds] = {"integer", "floating", "conversion", "special", "tensor",
                                           "shuffle", "memory",   "control",    "other"};
  std::ostringstream out;
  out << "{\"launches\": " << launches << ", \"blocks\": " << blocks << ", \"shared_bytes\": " << shared_bytes
      << ", \"lanes\": " << lanes << ", \"shared_accesses\": " << shared_accesses
      << ", \"shared_wavefronts\": " << shared_wavefronts << ", \"shared_ideal\": " << shared_ideal
      << ", \"global_accesses\": " << global_accesses << ", \"global_sectors\": " << global_sectors
      << ", \"global_bytes\": " << global_bytes << ", \"instructions\": {";
  for (int kind = 0; kind < kinds; ++kind)
    out << (kind == 0 ? "" : ", ") << '"' << names[kind] << "\": " << instructions[kind];
  out << "}, \"places\": {";
  const char* separator = "";
  for (const auto& [place, count] : places) {
    out << separator << '"' << place << "\": " << count;
    separator = ", ";
  }
  out << "}}";
  return out.str();
}

}  // namespace emulator
