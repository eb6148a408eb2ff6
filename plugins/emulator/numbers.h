// Numbers as PTX has them on a host: 16-bit floats, and conversions that saturate.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emulator {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float half_to_float(u16 x) { return static_cast<float>(bits<_Float16>(x)); }
inline u16 float_to_half(double x) { return bits<u16>(static_cast<_Float16>(x)); }
inline float bfloat_to_float(u16 x) { return bits<float>(static_cast<u32>(x) << 16); }
inline u16 float_to_bfloat(float x) {
  const u32 b = bits<u32>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<u16>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// To an integer of a value that is whole already: clamped, zero for NaN.
template <class To>
To saturated(double x) {
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}

}  // namespace emulator
