// Formats of stored numbers: codes in bytes, float8, levels of the normal distribution.
// The Python side is minicache_trt/compression/segment.py and packing.py; tests hold the two together.
#pragma once

#include "minicache/platform.cuh"

namespace minicache {

// Order of FORMATS in minicache_trt/compression/segment.py.
enum class Format : std::int32_t { model, fp8, int8, int4, int2, g4, g3, g2, g1, drop };
constexpr int kFormats = 10;

MC_HD constexpr int bits_of(Format format) {
  switch (format) {
    case Format::fp8:
    case Format::int8:
      return 8;
    case Format::int4:
    case Format::g4:
      return 4;
    case Format::g3:
      return 3;
    case Format::int2:
    case Format::g2:
      return 2;
    case Format::g1:
      return 1;
    default:
      return 0;
  }
}

MC_HD constexpr bool is_integer(Format format) {
  return format == Format::int8 || format == Format::int4 || format == Format::int2;
}

MC_HD constexpr bool is_gaussian(Format format) {
  return format == Format::g4 || format == Format::g3 || format == Format::g2 || format == Format::g1;
}

// A scale is stored with the codes; integers store a minimum as well.
MC_HD constexpr bool has_ranges(Format format) { return is_integer(format) || format == Format::fp8; }

// Where sums are taken over integer codes, they are taken of codes less their centre, and minima are those of centres:
// weights are rounded, and what that adds is the same for all components of a token, which maps may add up.
MC_HD constexpr int code_centre(int bits) { return 1 << (bits - 1); }
MC_HD constexpr float centre_of(Format format) {
  return is_integer(format) ? static_cast<float>(code_centre(bits_of(format))) : 0.0f;
}

// Stored bytes are byte - 128; as bits, that flips the top one.
MC_HD constexpr std::uint8_t stored_to_byte(std::int8_t stored) { return static_cast<std::uint8_t>(stored) ^ 0x80u; }
MC_HD constexpr std::int8_t byte_to_stored(std::uint8_t byte) { return static_cast<std::int8_t>(byte ^ 0x80u); }

// Code number `index` of a bitstream of `bits`-bit codes, low bits first. `stored` is the segment's first byte.
MC_HD int unpack_code(const std::int8_t* stored, int bits, int index) {
  const int bit = index * bits, byte = bit >> 3, shift = bit & 7;
  unsigned word = stored_to_byte(stored[byte]);
  if (shift + bits > 8) word |= static_cast<unsigned>(stored_to_byte(stored[byte + 1])) << 8;
  return static_cast<int>((word >> shift) & ((1u << bits) - 1u));
}

// e4m3 (no infinities; 0x7f and 0xff are NaN and never written).
MC_HD float fp8_to_float(std::uint8_t byte) {
  const std::uint32_t sign = static_cast<std::uint32_t>(byte & 0x80u) << 24;
  // The 7 lower bits as a binary32 with the exponent bias still to be restored: 2^(127 - 7).
  const float magnitude = bit_cast<float>(static_cast<std::uint32_t>(byte & 0x7fu) << 20) * 0x1p120f;
  return bit_cast<float>(bit_cast<std::uint32_t>(magnitude) | sign);
}

constexpr float kFloat8Max = 448.0f;

// Nearest e4m3 number, half to even, saturating at 448.
MC_HD std::uint8_t float_to_fp8(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = (bits >> 24) & 0x80u;
  float magnitude = bit_cast<float>(bits & 0x7fffffffu);
  if (magnitude > kFloat8Max) magnitude = kFloat8Max;
  if (magnitude < 0x1p-6f) {  // subnormal: multiples of 2^-9
    return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>(round_even(magnitude * 512.0f)));
  }
  const std::uint32_t m = bit_cast<std::uint32_t>(magnitude);
  const std::uint32_t rounded = m + 0x7ffffu + ((m >> 20) & 1u);
  return static_cast<std::uint8_t>(sign | ((rounded >> 20) - ((127u - 7u) << 3)));
}

// Lloyd-Max level of a code of the standard normal distribution (minicache_trt/compression/constants.py).
MC_HD constexpr float gaussian_level(int bits, int code) {
  constexpr float kLevels[4][8] = {
      {0.7978846f, 0, 0, 0, 0, 0, 0, 0},
      {0.4527800f, 1.5104176f, 0, 0, 0, 0, 0, 0},
      {0.2450942f, 0.7560053f, 1.3439093f, 2.1519457f, 0, 0, 0, 0},
      {0.1283950f, 0.3880483f, 0.6567591f, 0.9423405f, 1.2562312f, 1.6180464f, 2.0690172f, 2.7325896f},
  };
  const int half = 1 << (bits - 1);
  return code >= half ? kLevels[bits - 1][code - half] : -kLevels[bits - 1][half - 1 - code];
}

// Boundary number `index` (0 to 2^bits - 2): midpoint of two neighbouring levels, rounded from double as Python does.
MC_HD constexpr float gaussian_boundary(int bits, int index) {
  constexpr float kBoundaries[4][7] = {
      {0, 0, 0, 0, 0, 0, 0},
      {0.9815988f, 0, 0, 0, 0, 0, 0},
      {0.50054975f, 1.0499573f, 1.7479275f, 0, 0, 0, 0},
      {0.25822165f, 0.5224037f, 0.7995498f, 1.09928585f, 1.4371388f, 1.8435318f, 2.4008034f},
  };
  const int middle = (1 << (bits - 1)) - 1;
  if (index == middle) return 0.0f;
  return index > middle ? kBoundaries[bits - 1][index - middle - 1] : -kBoundaries[bits - 1][middle - 1 - index];
}

}  // namespace minicache
