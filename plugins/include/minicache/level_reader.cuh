// Gaussian codes as the levels they stand for, rounded to binary16: tables of bytes in registers, four codes at a time.
#pragma once

#include "minicache/formats.cuh"
#include "minicache/pairs.cuh"

namespace minicache {
namespace detail {

// Binary16 of a normal number, rounded to nearest.
MC_HD constexpr std::uint32_t half_bits(float x) {
  std::uint32_t sign = 0;
  if (x < 0.0f) {
    sign = 0x8000u;
    x = -x;
  }
  int exponent = 15;
  for (; x >= 2.0f; x /= 2.0f) ++exponent;
  for (; x < 1.0f; x *= 2.0f) --exponent;
  const std::uint32_t fraction = static_cast<std::uint32_t>((x - 1.0f) * 1024.0f + 0.5f);
  return sign | ((static_cast<std::uint32_t>(exponent) << 10) + fraction);
}

// Byte `byte` of levels `first` to first + 3; of 4-bit codes only the upper, positive eight are tabulated.
MC_HD constexpr std::uint32_t level_bytes(int bits, int first, int byte) {
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int code = first + i + (bits == 4 ? 8 : 0);
    if (code < 1 << bits) result |= ((half_bits(gaussian_level(bits, code)) >> (8 * byte)) & 0xffu) << (8 * i);
  }
  return result;
}

// Four codes of `Bits` bits, one every 4 bits.
template <int Bits>
MC_HD std::uint32_t spread_codes(std::uint32_t x) {
  if constexpr (Bits == 4) return x;
  if constexpr (Bits == 3) return (x & 0x7u) | (x & 0x38u) << 1 | (x & 0x1c0u) << 2 | (x & 0xe00u) << 3;
  if constexpr (Bits == 2) {
    x = ((x & 0xffu) | x << 4) & 0x0f0fu;
    return (x | x << 2) & 0x3333u;
  }
  x = ((x & 0xfu) | x << 6) & 0x0303u;
  return (x | x << 3) & 0x1111u;
}

// Low and high bytes of the levels of four codes, by looking bytes up in registers.
template <int Bits>
MC_HD void look_up(std::uint32_t four, std::uint32_t& low, std::uint32_t& high) {
  constexpr std::uint32_t kLow0 = level_bytes(Bits, 0, 0), kLow1 = level_bytes(Bits, 4, 0);
  constexpr std::uint32_t kHigh0 = level_bytes(Bits, 0, 1), kHigh1 = level_bytes(Bits, 4, 1);
  std::uint32_t index = spread_codes<Bits>(four), negative = 0;
  if constexpr (Bits == 4) {  // levels of codes c and 15 - c differ in sign
    negative = ~index & 0x8888u;
    index = (index ^ (negative - (negative >> 3))) & 0x7777u;
  }
  low = look_up_bytes<kLow0, kLow1>(index);
  high = look_up_bytes<kHigh0, kHigh1>(index);
  if constexpr (Bits == 4) {
    const std::uint32_t twice = permute_bytes<0x1100>(negative, 0);
    high ^= (twice << 4 & 0x00800080u) ^ (twice & 0x80008000u);
  }
}

// Eight codes as `level_pairs` takes them: of 3 and 4 bits one every 4 bits, in the order 0, 1, 4, 5, 2, 3, 6, 7; of
// fewer bits as they are stored, the second four from bit 8 on. Words have whatever above their codes: two of four,
template <int Bits>
MC_HD std::uint32_t ordered_codes(std::uint32_t first, std::uint32_t second) {
  if constexpr (Bits == 4) return permute_bytes<0x5140>(first, second);
  if constexpr (Bits == 3) {
    const std::uint32_t two =
        (first & 0x3fu) | (second << 8 & 0x3f00u) | (first << 10 & 0x3f0000u) | (second << 18 & 0x3f000000u);
    return (two & 0x07070707u) | (two << 1 & 0x70707070u);
  }
  return permute_bytes<0x0040>(first, second) & 0xffffu;
}
// or one of eight.
template <int Bits>
MC_HD std::uint32_t ordered_codes(std::uint32_t eight) {
  if constexpr (Bits == 4) return permute_bytes<0x3120>(eight, 0);
  if constexpr (Bits == 3) return ordered_codes<3>(eight, eight >> 12);
  if constexpr (Bits == 1) return (eight & 0xfu) | (eight << 4 & 0xf00u);
  return eight & 0xffffu;
}

// Levels of eight ordered codes as pairs of codes p and p + 4.
template <int Bits>
MC_HD void level_pairs(std::uint32_t codes, Pair<Half> (&out)[4]) {
  constexpr std::uint32_t kLow0 = level_bytes(Bits, 0, 0), kLow1 = level_bytes(Bits, 4, 0);
  constexpr std::uint32_t kHigh0 = level_bytes(Bits, 0, 1), kHigh1 = level_bytes(Bits, 4, 1);
  if constexpr (Bits <= 2) {  // both bytes of a level are among eight
    MC_UNROLL
    for (int p = 0; p < 4; p += 2) {
      const std::uint32_t x = codes >> (Bits * p);
      const std::uint32_t four = (x | x << (16 - Bits)) & ((1u << Bits) - 1u) * 0x01010101u;  // p, p + 4, p + 1, p + 5
      const std::uint32_t places = four * 0x11u + 0x40404040u;
      out[p].bits = look_up_bytes<kLow0, kHigh0>(places);
      out[p + 1].bits = look_up_bytes<kLow0, kHigh0>(places >> 16);
    }
  } else {
    std::uint32_t places = codes, negative = 0, even = 0;
    if constexpr (Bits == 4) {  // magnitudes: codes c and 15 - c differ in sign
      negative = ~codes & 0x88888888u;
      even = shifted<4>(negative);
      places = (codes ^ (negative - (negative >> 3))) & 0x77777777u;
    }
    MC_UNROLL
    for (int p = 0; p < 4; p += 2) {
      const std::uint32_t own = places >> (8 * p);
      const std::uint32_t low = look_up_bytes<kLow0, kLow1>(own);
      std::uint32_t high = look_up_bytes<kHigh0, kHigh1>(own);
      if constexpr (Bits == 4) {
        constexpr std::uint32_t kFirst = 0x9d8c, kSecond = 0xbfae;
        const std::uint32_t signs =
            p == 0 ? permute_bytes<kFirst>(negative, even) : permute_bytes<kSecond>(negative, even);
        high |= signs & 0x80808080u;
      }
      out[p].bits = permute_bytes<0x6240>(low, high);
      out[p + 1].bits = permute_bytes<0x7351>(low, high);
    }
  }
}

template <int Bits, int N>
MC_HD void gaussian_pairs(const std::uint32_t (&codes)[2], Pair<Half> (&out)[N / 2]) {
  if constexpr (N == 8) {
    level_pairs<Bits>(ordered_codes<Bits>(codes[0]), out);
  } else {
    std::uint32_t low, high;
    look_up<Bits>(codes[0], low, high);
    if constexpr (N == 2) out[0].bits = permute_bytes<0x5140>(low, high);
    if constexpr (N == 4) {
      out[0].bits = permute_bytes<0x6240>(low, high);
      out[1].bits = permute_bytes<0x7351>(low, high);
    }
  }
}

}  // namespace detail
}  // namespace minicache
